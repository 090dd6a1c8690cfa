"""Facts and questions, in the words that a tokenizer has."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from redknot_hf.profiling import calibration_kinds, calibration_prompts
from redknot_hf.profiling.wording import MAKERS, UnwritableError, ids_of, sentences_for

TINY = Path(__file__).parents[1] / "evals" / "tiny"


@pytest.fixture(scope="module")
def plain():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize("seed", range(5))
def test_codes_are_written_in_words_that_the_bundled_tokenizer_has(plain, seed):
    rng = random.Random(seed)
    facts, asked = MAKERS["codes"](rng)
    for text in [*facts, *(text for text, _ in asked), *(next(sentences_for("codes")(rng)) for _ in range(50))]:
        assert plain.decode(ids_of(plain, text)).split() == text.split()


@pytest.mark.parametrize("kind", ["passkey", "two_hop", "home", "pairs", "copy"])
def test_a_kind_without_words_is_named(plain, kind):
    with pytest.raises(UnwritableError, match="the tokenizer has no words for '"):
        calibration_prompts(plain, length=600, kinds=[kind], count=1)


def test_kinds_without_words_are_left_out_with_a_word(plain, byte_tokenizer):
    with pytest.warns(
        UserWarning, match="no words for passkey, pairs, two_hop, copy, home, boat: prompts are codes, repeats"
    ):
        prompts = calibration_prompts(plain, length=300, count=3)
    assert [(prompt.kind, len(prompt)) for prompt in prompts] == [("codes", 300), ("repeats", 300), ("codes", 300)]
    with pytest.warns(UserWarning, match="no words for .*text"):
        calibration_kinds(["Some text of the caller's."], plain)
    assert calibration_kinds((), byte_tokenizer) == calibration_kinds()
    (prompt,) = calibration_prompts(byte_tokenizer, length=900, kinds=["codes"], count=1)
    assert len(prompt) == 900
