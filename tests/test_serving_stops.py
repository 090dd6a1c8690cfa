"""Where answers end, and what may be shown of them."""

import pytest

from redknot_hf.serving.request import Sampling
from redknot_hf.serving.stops import Stopper, before, held_back


def test_texts_up_to_a_stop():
    assert before("one two three", ["three", "two"]) == "one "
    assert before("one two three", ["four"]) == "one two three"
    assert before("one", []) == "one"


@pytest.mark.parametrize(("text", "held"), [("abc", 0), ("abcE", 1), ("abcEN", 2), ("abcEND", 3), ("E", 1), ("", 0)])
def test_what_may_begin_a_stop_is_held_back(text, held):
    assert held_back(text, ["ENDE", "DX"]) == held


def test_strings_that_span_tokens(byte_tokenizer):
    ids = byte_tokenizer("The river ran high.", add_special_tokens=False)["input_ids"]
    stopper = Stopper(Sampling(stop=["ran hi"]), [], byte_tokenizer)
    ended = [stopper.ends(ids[: n + 1]) for n in range(len(ids))]
    assert not ended[0]
    assert ended[-1]
    first = ended.index(True)
    assert "ran hi" in byte_tokenizer.decode(ids[: first + 1])
    assert "ran hi" not in byte_tokenizer.decode(ids[:first])
