import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redknot_hf.profiling import calibration_kinds, calibration_prompts
from redknot_hf.profiling.calibration import QUESTIONS
from redknot_hf.profiling.texts import python_texts, read_texts


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte is a token."""
    vocabulary = {char: i + 1 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({"<s>": 0, **vocabulary}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def answers(tokenizer, prompt):
    """Question and answer, as text, for each run of scored tokens."""
    edges = torch.nonzero(torch.diff(prompt.scored.int(), prepend=torch.tensor([0]), append=torch.tensor([0])))[:, 0]
    last = 0
    for start, stop in edges.reshape(-1, 2).tolist():
        yield tokenizer.decode(prompt.ids[last:start]), tokenizer.decode(prompt.ids[start:stop]).strip()
        last = stop


@pytest.mark.parametrize("texts", [(), ("Once upon a time. " * 400,)])
def test_every_kind_asks_what_its_text_says(tokenizer, texts):
    kinds = ("passkey", "pairs", "two_hop", "home")
    for prompt in calibration_prompts(tokenizer, length=3000, count=8, kinds=kinds, texts=texts):
        asked = list(answers(tokenizer, prompt))
        assert len(asked) == QUESTIONS
        text = asked[0][0]
        for question, answer in asked:
            line = question.splitlines()[-1]
            if prompt.kind == "passkey":
                assert f"pass key of {line.split(' of ')[1].split('?')[0]} is {answer}." in text
            elif prompt.kind == "home":
                assert f" {line} {answer}." in text
            elif prompt.kind == "pairs":
                assert f"\n{line} {answer}\n" in text
            else:
                friend = text.split(f" The best friend of {line.split()[4]} is ")[1].split(".")[0]
                assert f" {friend} lives in {answer}." in text
        assert len(prompt) == 3000
        assert ("upon" in text) == (bool(texts) and prompt.kind != "pairs")


@pytest.mark.parametrize("merges", [(), ("1 2", "12 3", "o l", "ol d", "e r", "- 1")])
@pytest.mark.parametrize("texts", [(), ("Once upon a time. " * 400,)])
def test_prompts_are_as_long_as_asked_whatever_the_tokenizer(merges, texts):
    vocabulary = {char: i + 1 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {merge.replace(" ", ""): 257 + i for i, merge in enumerate(merges)}
    backend = Tokenizer(models.BPE({"<s>": 0, **vocabulary}, [tuple(merge.split()) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    kinds = calibration_kinds(texts)
    for length in (1999, 2048):
        found = calibration_prompts(tokenizer, length=length, count=len(kinds), texts=texts)
        assert {prompt.kind: len(prompt) for prompt in found} == dict.fromkeys(kinds, length)


@pytest.mark.parametrize("texts", [(), ("".join(f"{i} " for i in range(2000)),)])
def test_a_copy_is_of_what_the_text_says(tokenizer, texts):
    for prompt in calibration_prompts(tokenizer, length=1000, count=3, kinds=("copy",), texts=texts):
        copied = prompt.ids[prompt.scored]
        assert prompt.scored.tolist() == [False] * 912 + [True] * 88
        said, mark = tokenizer.decode(prompt.ids[:-97]), tokenizer.decode(prompt.ids[-97])
        assert mark == "\n"
        assert tokenizer.decode(prompt.ids[-96:]) in said
        assert tokenizer.decode(copied) == tokenizer.decode(prompt.ids[-88:])


def test_texts_that_python_ships_are_long():
    assert sum(map(len, python_texts())) > 300_000


def test_repeats_need_no_words(tokenizer):
    (prompt,) = calibration_prompts(tokenizer, length=101, count=1, kinds=("repeats",))
    assert (prompt.ids[:50] == prompt.ids[51:]).sum() >= 50 - 1
    assert prompt.scored.sum() == 49
    assert 0 not in prompt.ids


def test_texts_are_read_as_they_are(tokenizer):
    words = "".join(f"{i} " for i in range(2000))
    (prompt,) = calibration_prompts(tokenizer, length=100, count=1, kinds=("text",), texts=(words,))
    assert tokenizer.decode(prompt.ids) in words
    assert prompt.scored.tolist() == [False] * 50 + [True] * 50


def test_kinds_take_turns_and_seeds_decide(tokenizer):
    make = lambda seed: calibration_prompts(tokenizer, length=2000, count=6, texts=("words " * 999,), seed=seed)  # noqa: E731
    assert [prompt.kind for prompt in make(0)] == ["passkey", "pairs", "two_hop", "repeats", "text", "copy"]
    same = [torch.equal(a.ids, b.ids) for a, b in zip(make(3), make(3), strict=True)]
    assert all(same)
    assert not torch.equal(make(3)[0].ids, make(4)[0].ids)


def test_a_tokenizer_with_a_first_token_has_it(tokenizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    prompts = calibration_prompts(tokenizer, length=2000, count=4)
    assert all(prompt.ids[0] == 0 and 0 not in prompt.ids[1:] for prompt in prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 300}, "length=300: a prompt of kind 'passkey' needs"),
        ({"length": 300, "kinds": ("poem",)}, "'poem' is unknown"),
        ({"length": 300, "kinds": ("text",)}, "needs texts"),
        ({"length": 300, "kinds": ("text",), "texts": ("short",)}, "the texts have 5 tokens"),
        ({"length": 2, "kinds": ("repeats",)}, "a repeat needs 4"),
        ({"length": 200, "kinds": ("pairs",)}, "length=200: a prompt of kind 'pairs' needs"),
        ({"length": 10, "kinds": ("copy",)}, "length=10: a prompt of kind 'copy' needs"),
        ({"length": 300, "kinds": ()}, "name some of"),
    ],
)
def test_what_does_not_fit_is_told(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        calibration_prompts(tokenizer, **options)


def test_a_text_file_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert read_texts(str(tmp_path / "a.txt")) == ["one\n\ntwo"]


def test_a_data_file_is_read(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n{"id": 3, "text": "3"}\n')
    source = str(tmp_path / "a.jsonl")
    assert read_texts(source, limit=2) == ["one", "two"]
    with pytest.raises(ValueError, match="no column id"):
        read_texts(source, column="id")
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl does not exist"):
        read_texts(str(tmp_path / "b.jsonl"))
