import re
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from evals import tasks
from evals.task import Example
from evals.tasks.documents import Inquiry, Passage, ask
from evals.tasks.length import cut_middle, fullest, prompt_tokens, tokens
from evals.tasks.prose import Prose, scatter
from evals.tasks.vocabulary import distinct, listed_words, number, proper_name, with_articles, word_pair


@pytest.fixture
def rng():
    return np.random.default_rng(0)


MADE = [name for name in tasks.names() if name.split("/")[0] in ("ruler", "needle", "key_value")]


def test_names_are_unique_and_load():
    assert len(set(tasks.names())) == len(tasks.names())
    for name in tasks.names():
        if name != "perplexity":
            assert tasks.load(name).name == name
    with pytest.raises(ValueError, match=r"'ruler/vtt': choose one of ruler/niah_single_1, .*, ruler/qa_2$"):
        tasks.load("ruler/vtt")
    with pytest.raises(ValueError, match=r"'squad': choose one of tiny/all, "):
        tasks.load("squad")


@pytest.mark.parametrize("name", MADE)
def test_made_prompts_fill_the_length(byte_tokenizer, name):
    task = tasks.load(name)
    examples = list(task.examples(byte_tokenizer, 1300, 6, seed=0))
    assert all(0.85 * 1300 <= prompt_tokens(byte_tokenizer, example) <= 1300 for example in examples)
    assert [example.id for example in examples] == [f"{name}-1300-0-{i}" for i in range(6)]
    assert list(task.examples(byte_tokenizer, 1300, 4, seed=0)) == examples[:4]
    other = next(task.examples(byte_tokenizer, 1300, 1, seed=1))
    assert other.context != examples[0].context != examples[1].context
    for example in examples:
        assert all(answer in example.context for answer in example.answers)
        assert not set(example.answers) & set(re.split(r"\W+", example.question + example.answer_prefix))
        assert not example.documents or "".join(example.documents) == example.context
        used = max(tokens(byte_tokenizer, answer) for answer in example.answers)
        assert used <= example.max_new_tokens
    with pytest.raises(ValueError, match=rf"prompt of {name}-40-0-0 has \d+ tokens, length is 40"):
        next(task.examples(byte_tokenizer, 40, 1, seed=0))


@pytest.mark.parametrize(
    "name", ["ruler/niah_single_1", "ruler/niah_multikey_2", "ruler/vt", "ruler/cwe", "key_value"]
)
def test_who_makes_all_texts_takes_no_source(name):
    with pytest.raises(ValueError, match="takes no source, not 'x'"):
        tasks.load(name, source="x")


def sized(size: int) -> Example:
    return Example("e", "a " * size, "b", ("c",), 1)


@pytest.mark.parametrize("guess", [1, 7, 60, 5000])
@pytest.mark.parametrize("largest", [None, 20, 90000])
def test_fullest_finds_the_size(byte_tokenizer, guess, largest):
    built = []

    def build(size):
        built.append(size)
        return sized(size)

    example, size = fullest(build, byte_tokenizer, 200, 1, guess, largest)
    base = prompt_tokens(byte_tokenizer, sized(1))
    slope = prompt_tokens(byte_tokenizer, sized(11)) - base
    limit = 1 + 10 * (200 - base) // slope
    assert example == sized(size)
    assert min(limit, largest or limit) * 0.97 <= size <= min(limit, largest or limit)
    assert len(built) <= 6


def test_fullest_of_prompts_that_jump(byte_tokenizer):
    example, size = fullest(lambda size: sized(1 + 90 * (size > 12)), byte_tokenizer, 60, 1, 40)
    assert (size, example) == (12, sized(1))


def test_prompt_tokens_are_those_of_its_parts(byte_tokenizer):
    example = Example("e", "a map shows", " the river", ("x",), 1, answer_prefix=" but")
    ids = byte_tokenizer(example.context)["input_ids"]
    assert ids[0] == byte_tokenizer.bos_token_id
    rest = byte_tokenizer(" the river but", add_special_tokens=False)["input_ids"]
    assert prompt_tokens(byte_tokenizer, example) == len(ids) + len(rest)
    parts = ("a m", "ap sho", "ws")
    apart = [len(byte_tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts]
    assert 1 + sum(apart) > len(ids)
    assert prompt_tokens(byte_tokenizer, replace(example, documents=parts)) == 1 + sum(apart) + len(rest)


@pytest.mark.parametrize("length", [9, 50, 10**4])
def test_cut_middle_keeps_both_ends(byte_tokenizer, length):
    text = " ".join(str(i) for i in range(300))
    cut = cut_middle(byte_tokenizer, text, length, special=True)
    used = tokens(byte_tokenizer, cut, special=True)
    if length == 10**4:
        assert cut == text
        return
    assert length - 2 <= used <= length
    head = next(i for i in count() if not text.startswith(cut[: i + 1]))
    assert text.endswith(cut[head:])
    assert abs(tokens(byte_tokenizer, cut[:head]) - length // 2) <= 2
    with pytest.raises(ValueError, match="no room for the context"):
        cut_middle(byte_tokenizer, text, 1, special=True)


def test_prose_of_a_file(tmp_path, rng):
    (tmp_path / "essay.txt").write_text("One thing. Is it two?\n\nThree!  ")
    found = Prose(str(tmp_path / "essay.txt")).sentences(rng, 7)
    assert sorted(found[:3]) == ["Is it two?", "One thing.", "Three!"]
    assert found[3:] == [*found[:3], found[0]]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        Prose(str(tmp_path / "empty.txt"))


def test_prose_is_made_without_end(rng):
    sentences = Prose().sentences(rng, 3000)
    assert len(set(sentences)) > 2000
    assert not any(char.isdigit() or char in "{}" for char in "".join(sentences))
    assert with_articles("a apple and a pear. A owl") == "an apple and a pear. An owl"


def test_scatter_keeps_both_orders(rng):
    text = scatter(rng, ["x"] * 20, ["a", "b", "c"])
    assert [part for part in text if part != "x"] == ["a", "b", "c"]
    assert text.count("x") == 20
    places = {text.index("a") for text in (scatter(rng, ["x"] * 3, ["a"]) for _ in range(60))}
    assert places == {0, 1, 2, 3}


def test_vocabulary_does_not_repeat(rng):
    assert len(set(distinct(rng, word_pair, 5000))) == 5000
    assert len(set(distinct(rng, proper_name, 5000))) == 5000
    for n in (50, 6000):
        words = listed_words(rng, n)
        assert len(set(words)) == n
        assert all(word.isalpha() for word in words)
    assert {len(number(rng, 3)) for _ in range(99)} == {3}
    with pytest.raises(ValueError, match="11 different things are wanted"):
        distinct(rng, lambda rng: str(rng.integers(10)), 11)
    with pytest.raises(ValueError, match="ask for a shorter length"):
        listed_words(rng, 10**6)


def test_needle_lies_at_its_depth(byte_tokenizer):
    examples = list(tasks.load("needle").examples(byte_tokenizer, 800, 22, seed=0))
    assert [example.kind for example in examples[:11]] == [f"depth {10 * i}%" for i in range(11)]
    for example in examples:
        place = example.context.index(example.answers[0]) / len(example.context)
        assert abs(place - int(example.kind[6:-1]) / 100) < 0.16


def test_key_values_are_asked_everywhere(byte_tokenizer):
    for i, example in enumerate(tasks.load("key_value").examples(byte_tokenizer, 2500, 10, seed=0)):
        lines = [line for line in example.context.splitlines() if line.startswith('"')]
        key = example.question.removeprefix("Key: ").strip()
        (place,) = [place for place, line in enumerate(lines) if line.startswith(key)]
        assert example.kind == f"fifth {i % 5 + 1}"
        assert place * 5 // len(lines) == i % 5
        assert lines[place].rstrip(",") == f'{key}: "{example.answers[0]}"'


def test_perplexity_goes_on_with_the_text(byte_tokenizer, tmp_path, rng):
    text = " ".join(Prose().sentences(rng, 120))
    (tmp_path / "text.txt").write_text(text)
    task = tasks.load("perplexity", str(tmp_path / "text.txt"))
    examples = list(task.examples(byte_tokenizer, 500, 8, seed=0))
    assert task.metric == "likelihood"
    for example in examples:
        (answer,) = example.answers
        assert example.context + example.question + answer in text
        assert example.given
        assert 8 <= tokens(byte_tokenizer, example.question) <= 12
        assert 495 <= prompt_tokens(byte_tokenizer, example) <= 500
        assert 250 <= tokens(byte_tokenizer, answer) <= 258
        assert example.max_new_tokens == tokens(byte_tokenizer, answer)
    assert len({example.context for example in examples}) == 8
    assert list(task.examples(byte_tokenizer, 500, 3, seed=0)) == examples[:3]
    with pytest.raises(ValueError, match=r"text.txt has \d+ tokens, a stretch of 90000"):
        next(task.examples(byte_tokenizer, 90000, 1, seed=0))
    name = task.name
    assert re.fullmatch(r"perplexity of text\.txt [0-9a-f]{8}", name)
    (tmp_path / "text.txt").write_text(text.upper())
    assert tasks.load("perplexity", str(tmp_path / "text.txt")).name != name
    with pytest.raises(ValueError, match="needs more than 16 tokens, length is 16"):
        next(task.examples(byte_tokenizer, 16, 1, seed=0))
    with pytest.raises(ValueError, match="give a text file"):
        tasks.load("perplexity")


def test_documents_do_not_tell_their_place():
    passage = Passage("Lake", "A lake is deep.")
    inquiry = Inquiry("i", "How deep?", ("very",), (passage,))
    others = [Passage(f"Hill {i}", "High.") for i in range(6)]
    asked = [ask(np.random.default_rng(seed), inquiry, others) for seed in range(20)]
    places = {example.documents.index("Document: Lake\nA lake is deep.\n\n") for example in asked}
    assert len(places) > 3
    assert len({frozenset(example.documents) for example in asked}) == 1
    assert replace(asked[0], context="", documents=()) == replace(asked[1], context="", documents=())
