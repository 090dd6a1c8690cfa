import copy
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from evals.tiny.corpus import ANSWER, Collection, Corpus
from evals.tiny.facts import DEPENDENT_KINDS, FACT_TOKENS, KINDS, QUESTION_TOKENS
from evals.tiny.lexicon import Lexicon
from redknot_hf import HeadPlan, cache_argument

FOLDER = Path(__file__).parents[1] / "evals" / "tiny"
MIXES = (KINDS, DEPENDENT_KINDS)


@pytest.fixture(scope="module")
def lexicon():
    return Lexicon()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("seed", "length", "n_questions", "digest"),
    [
        (0, 128, 2, "31a569325750dddf"),
        (1, 777, 1, "26fb31ffe4db77bc"),
        (2, 2048, 24, "3424100ebe0b6045"),
        (3, 300, 14, "ffc3f3b920b7f943"),
    ],
)
def test_sample_never_changes(lexicon, seed, length, n_questions, digest):
    ids, weights = Corpus(lexicon, seed).sample(length, n_questions)
    assert ids.shape == weights.shape == (length,)
    data = ids.astype("<i8").tobytes() + weights.astype("<f4").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == digest


@pytest.mark.parametrize("n_questions", [5, 8, 20, 41])
@pytest.mark.parametrize("length", [1500, 8192])
def test_collection_holds_what_it_asks(lexicon, length, n_questions):
    collection = Corpus(lexicon, n_questions).collection(length, n_questions)
    assert length - 250 <= len(collection.context) <= length
    assert len(collection.questions) == n_questions
    assert {question.kind for question in collection.questions} == set(KINDS)
    text = lexicon.decode(collection.context)
    assert text.startswith("<bos> <doc> ")
    for question in collection.questions:
        for sentence in sources(question.kind, lexicon.decode(question.prompt), lexicon.decode(question.answer)):
            assert f" {sentence} ." in text


def sources(kind: str, prompt: str, answer: str) -> list[str]:
    """Return the sentences that a question needs."""
    words = prompt.removeprefix("question : ").removesuffix(" ? answer :").split()
    match kind:
        case "code":
            return [f"the code of {' '.join(words[5:])} is {answer}"]
        case "place":
            return [f"{words[2]} lives in {answer}"]
        case "country":
            return [f"{words[3]} lives in {answer.split()[0]}", answer]
        case "variable":
            return [f"variable {words[-1]} equals {answer}"]
        case _:
            return [f"variable {words[-1]} equals variable {answer.split()[0]}", f"variable {answer}"]


@pytest.mark.parametrize("kinds", [("variable",), ("code", "place"), ("country", "total"), DEPENDENT_KINDS])
@pytest.mark.parametrize("n_questions", [1, 7, 30])
def test_collection_asks_the_kinds_wanted(lexicon, kinds, n_questions):
    questions = Corpus(lexicon, 1).collection(4096, n_questions, kinds).questions
    assert len(questions) == n_questions
    assert {question.kind for question in questions} == set(kinds[:n_questions])


@pytest.mark.parametrize("seed", range(4))
def test_later_documents_depend_on_earlier_ones(lexicon, seed):
    collection = Corpus(lexicon, seed).collection(2048, 18, DEPENDENT_KINDS, n_documents=8)
    documents = (
        lexicon.decode(collection.context).removeprefix("<bos> <doc> ").removesuffix(" </doc>").split(" </doc> <doc> ")
    )
    assert len(documents) == 8
    told = [(sentence, at) for at, text in enumerate(documents) for sentence in text.split(" . ")]
    told = [(sentence.removesuffix(" ."), at) for sentence, at in told]
    readers = {"nickname": (read_nickname, 4), "companion": (read_companion, 4), "total": (read_total, 7)}
    for question in collection.questions:
        read, place = readers[question.kind]
        answer, read_in = read(told, lexicon.decode(question.prompt).split()[place])
        assert lexicon.decode(question.answer) == answer
        assert read_in == sorted(set(read_in))  # each in a document after the one before
        assert len(read_in) > 1


# Each reader goes through the sentences in order, and knows at each what came before, and nothing else.


def read_nickname(told: list[tuple[str, int]], person: str) -> tuple[str, list[int]]:
    meant: dict[str, tuple[str, int]] = {}
    for sentence, at in told:
        if " is person " in sentence:
            nickname, name = sentence.split(" is person ")
            meant[nickname] = (name, at)
        elif " lives in " in sentence:
            nickname, city = sentence.split(" lives in ")
            if nickname in meant and meant[nickname][0] == person:
                return city, [meant[nickname][1], at]
    raise AssertionError(person)


def read_companion(told: list[tuple[str, int]], person: str) -> tuple[str, list[int]]:
    home: dict[str, tuple[str, int]] = {}
    for sentence, at in told:
        if sentence.startswith(f"{person} lives where "):
            city, before = home[sentence.split()[-2]]
            return city, [before, at]
        if " lives in " in sentence:
            name, city = sentence.split(" lives in ")
            home[name] = (city, at)
    raise AssertionError(person)


def read_total(told: list[tuple[str, int]], variable: str) -> tuple[str, list[int]]:
    steps = [(int(text.split()[-1]), at) for text, at in told if text.startswith(f"the total of {variable} ")]
    return str(sum(step for step, _ in steps)), [at for _, at in steps]


def test_dependent_facts_have_words_of_their_own(lexicon):
    exam = Corpus(lexicon, 2).exam(8192, {"person": 40, "variable": 40, "nickname": 35, "companion": 35, "total": 40})
    text = lexicon.decode(exam.ids)
    names = [name for name in lexicon.names if f" {name} lives in " in text or f" is person {name} " in text]
    assert all(text.count(f" {name} lives in ") <= 2 for name in names)
    assert not [name for name in names if f" {name} lives in " in text and f" is person {name} " in text]
    assert max(text.count(f" lives in {city} ") for city in lexicon.cities) == 1
    assert not [v for v in lexicon.variables if f" variable {v} " in text and f" total of {v} " in text]


def test_words_run_out_with_an_error(lexicon):
    with pytest.raises(ValueError, match="more words"):
        Corpus(lexicon, 0).exam(16384, {"nickname": 140})
    with pytest.raises(ValueError, match="at least 4"):
        Corpus(lexicon, 0).collection(2048, 6, DEPENDENT_KINDS, n_documents=3)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("nickname", "{word} is person {meaning} . {word} {meaning} lives in"),
        ("companion", "{word} lives in {meaning} . lives where {word} {meaning} lives ."),
    ],
)
def test_training_texts_tell_what_words_stand_for(lexicon, kind, told):
    exam = Corpus(lexicon, 0, told=1.0).exam(1024, {kind: 4})
    words = lexicon.decode(exam.ids).split()
    text = " ".join(words)
    places = [at for at in np.flatnonzero(exam.weights == ANSWER).tolist() if at < words.index("question")]
    assert len(places) >= 4
    for at in places:
        known, read = told.format(word=words[at - 1], meaning=words[at]).split(" . ", 1)
        assert 0 < text.index(known) < text.index(read)
    assert not (Corpus(lexicon, 0).exam(1024, {kind: 4}).weights[: words.index("question")] == ANSWER).any()


@pytest.mark.parametrize("family", FACT_TOKENS)
def test_tokens_of_a_fact_and_its_question(lexicon, family):
    corpus = Corpus(lexicon, 0, told=1.0)
    fact, asked = 0, 0
    for _ in range(40):
        facts = corpus.facts.make({family: 1})
        fact = max(fact, facts.tokens)
        (questions,) = facts.asked
        asked = max(asked, *(len(q.prompt) + len(q.answer) + 1 for q in (*questions, *questions)))
    assert (fact, asked) == (FACT_TOKENS[family], QUESTION_TOKENS[family])


def test_new_words_leave_the_ids_of_others(lexicon):
    data = " ".join(lexicon.words[:1170])
    assert hashlib.sha256(data.encode()).hexdigest()[:16] == "13709300117bf04d"
    assert lexicon.words[1170:] == ["same", "called", "own", "total", "grows", "by"]


def test_collection_refuses_a_length_its_facts_exceed(lexicon):
    with pytest.raises(ValueError, match="length is 200"):
        Corpus(lexicon, 0).collection(200, 20)


def test_tokenizer_is_the_lexicon(lexicon, tokenizer, model):
    assert tokenizer.get_vocab() == lexicon.id
    assert len(tokenizer) <= model.config.vocab_size
    ids = Corpus(lexicon, 5).sample(600, 10)[0].tolist()
    assert tokenizer.decode(ids) == lexicon.decode(ids)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_tokenizer_pads_on_the_left(tokenizer, model):
    batch = tokenizer(["the code of", "where does the old baker live ?"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, :4].tolist() == [model.generation_config.pad_token_id] * 4
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 7]


def test_plan_fits_the_model(model):
    assert HeadPlan.load(FOLDER / "plan.json", model.config).num_global == 10


def test_model_answers(lexicon, model):
    collections = [Corpus(lexicon, seed).collection(1024, 16, kinds) for seed, kinds in enumerate(MIXES)]
    results = [result for collection in collections for result in answer_all(model, collection, lexicon.id["."])]
    forced = [hit for hits, _ in results for hit in hits]
    assert sum(forced) / len(forced) >= 0.98
    generated = [exact for _, exact in results]
    assert sum(generated) / len(generated) >= 0.95


@torch.no_grad()
def answer_all(model, collection: Collection, end: int) -> list[tuple[list[bool], bool]]:
    """Return per question the answer's tokens predicted one by one, and whether it is generated whole."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([collection.context]), **cache_argument(model, cache), logits_to_keep=1)
    results = []
    for question in collection.questions:
        expected = [*question.answer, end]
        ids = torch.tensor([question.prompt + expected[:-1]])
        logits = model(
            input_ids=ids, **cache_argument(model, copy.deepcopy(cache)), logits_to_keep=len(expected)
        ).logits
        hits = (logits[0].argmax(-1) == torch.tensor(expected)).tolist()
        ids = torch.tensor([collection.context + question.prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=len(expected),
        )
        results.append((hits, output[0, ids.shape[1] :].tolist() == expected))
    return results
