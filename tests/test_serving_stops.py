"""Where answers end."""

from types import SimpleNamespace

import pytest

from redknot_hf.serving.request import Sampling
from redknot_hf.serving.stops import Stopper, ends_of


@pytest.mark.parametrize(("told", "ends"), [(None, ()), (2, (2,)), ([2, 7], (2, 7))])
def test_the_models_own_ends(told, ends):
    assert ends_of(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=told))) == ends


def test_strings_that_span_tokens(byte_tokenizer):
    ids = byte_tokenizer("The river ran high.", add_special_tokens=False)["input_ids"]
    stopper = Stopper(Sampling(stop=["ran hi"]), [], byte_tokenizer)
    ended = [stopper.ends(ids[: n + 1]) for n in range(len(ids))]
    assert not ended[0]
    assert ended[-1]
    first = ended.index(True)
    assert "ran hi" in byte_tokenizer.decode(ids[: first + 1])
    assert "ran hi" not in byte_tokenizer.decode(ids[:first])


def test_strings_that_name_special_tokens_or_stand_around_one(byte_tokenizer):
    special = byte_tokenizer.all_special_tokens[0]
    for string in (f"n{special}", "river"):
        ids = byte_tokenizer(f"The riv{special}er ran{special} on.", add_special_tokens=False)["input_ids"]
        stopper = Stopper(Sampling(stop=[string]), [], byte_tokenizer)
        ended = [stopper.ends(ids[: n + 1]) for n in range(len(ids))].index(True)
        said = byte_tokenizer.decode(ids[: ended + 1], skip_special_tokens=string == "river")
        assert said.endswith(string)
