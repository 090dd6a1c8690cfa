from itertools import groupby
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from evals import tasks
from evals.tiny.facts import DEPENDENT_KINDS, KINDS

FOLDER = Path(__file__).parents[1] / "evals" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", tasks.tiny.NAMES)
def test_prompts_fit_and_documents_make_the_context(tokenizer, name):
    for example in tasks.load(name).examples(tokenizer, 1024, 14, seed=3):
        asked = tokens(tokenizer, example.question + example.answer_prefix)
        context = tokens(tokenizer, example.context)
        assert 1024 - 250 <= len(context) + len(asked) <= 1024
        assert "".join(example.documents) == example.context
        assert [token for part in example.documents for token in tokens(tokenizer, part)] == context
        assert example.documents[0] == "<bos>"
        assert all(part.startswith(" <doc> ") and part.endswith(" </doc>") for part in example.documents[1:])
        assert len(example.documents) > 2
        (answer,) = example.answers
        assert len(tokens(tokenizer, answer + (example.stop or ""))) <= example.max_new_tokens
        if example.kind in ("code", "place", "variable", "nickname", "companion"):
            assert f" {answer} ." in example.context


@pytest.mark.parametrize(
    ("name", "kinds"), [("tiny/all", {*KINDS, *DEPENDENT_KINDS}), ("tiny/plain", {*KINDS}), ("tiny/total", {"total"})]
)
def test_kinds_of_a_mix(tokenizer, name, kinds):
    examples = list(tasks.load(name).examples(tokenizer, 2048, 40, seed=0))
    assert {example.kind for example in examples} == kinds
    assert len({example.id for example in examples}) == 40
    texts = [list(group) for _, group in groupby(examples, key=lambda example: example.context)]
    assert [len(text) for text in texts] == [20, 20]


def test_seeds_and_counts(tokenizer):
    task = tasks.load("tiny/all")
    few, many, other = (list(task.examples(tokenizer, 512, *drawn)) for drawn in ((6, 0), (9, 0), (6, 1)))
    assert few == many[:6]
    assert not {example.context for example in few} & {example.context for example in other}
    elsewhere = next(tasks.load("tiny/plain").examples(tokenizer, 512, 1, seed=0))
    assert elsewhere.context not in {example.context for example in many}


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match=r"need .* tokens, length is"):
        list(tasks.load("tiny/all").examples(tokenizer, 100, 1, seed=0))
    with pytest.raises(ValueError, match="takes no source"):
        tasks.load("tiny/code", source="file.txt")
    with pytest.raises(ValueError, match=r"'tiny/cods': choose one of tiny/all, .*tiny/total"):
        tasks.load("tiny/cods")


def test_needs_the_model_of_its_language():
    class Other:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ValueError, match="use that model and its tokenizer"):
        tasks.load("tiny/all").examples(Other(), 512, 1, seed=0)
