"""Text in, text out: what comes is what comes by hand, with token ids."""

import copy

import pytest
import torch
from families import make_model
from oracle import random_plan

from redknot_hf import RedKnotCache, Seams, SegmentStore, ask, assemble, prompt
from redknot_hf.reuse.ask import answers, generated
from redknot_hf.reuse.texts import TakesTexts

TEXTS = ["The house is green.", "Ann lives there.", "Bob moved out in May, and took the cat."]
QUESTIONS = ["Who lives there?", "And the cat?", "Which colour has the house that Ann lives in?"]
NEW = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model(byte_tokenizer):
    return make_model("qwen3", num_hidden_layers=2, vocab_size=len(byte_tokenizer), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def store(model):
    return SegmentStore(model, random_plan(model.config))


@pytest.fixture(scope="module")
def seams(byte_tokenizer):
    return Seams(byte_tokenizer)


@pytest.fixture(scope="module")
def cache(model, store, seams):
    return assemble(model, store.add_texts(TEXTS, seams), boundary="all")


def by_hand(model, cache, seams, question):
    made = prompt(cache, list(seams.question(question)))
    out = model.generate(**made, **NEW)
    return out[0, made["input_ids"].shape[1] :].tolist()


def test_texts_are_added_behind_what_begins_a_prompt(store, seams, byte_tokenizer):
    assert isinstance(store, TakesTexts)
    parts = store.add_texts(TEXTS, byte_tokenizer)
    head = store.add([byte_tokenizer.bos_token_id])
    assert parts == [head, *store.add_all([seams.document(text) for text in TEXTS], head)]
    computed = store.counts.computed
    assert store.add_texts(TEXTS[::-1], byte_tokenizer)[1:] == parts[:0:-1]
    assert store.counts.computed == computed, "what the store has is not read again"
    for wrong, message in (("a text", "is one text"), ([], "there are no texts"), ([""], "a document is ''")):
        with pytest.raises(ValueError, match=message):
            store.add_texts(wrong, byte_tokenizer)


def test_a_tokenizer_that_puts_nothing_first_has_no_head(store, byte_tokenizer):
    bare = copy.deepcopy(byte_tokenizer)
    bare.backend_tokenizer.post_processor = None
    (part,) = store.add_texts(TEXTS[:1], Seams(bare))
    assert part.prefix == ()


def test_a_question_is_text_where_there_is_a_tokenizer(cache, seams, byte_tokenizer):
    told, made = prompt(cache, QUESTIONS[0], tokenizer=byte_tokenizer), prompt(cache, seams.question(QUESTIONS[0]))
    assert told["input_ids"].tolist() == made["input_ids"].tolist()


def test_answers_are_those_by_hand_whatever_the_batch(model, cache, seams):
    tokens = cache.get_seq_length()
    wanted = [seams.answer(by_hand(model, cache, seams, question)) for question in QUESTIONS]
    assert len(set(wanted)) > 1
    assert ask(model, cache, QUESTIONS[0], seams, **NEW) == wanted[0]
    for batch_size in (1, 2, 3):
        assert ask(model, cache, QUESTIONS, seams, batch_size=batch_size, **NEW) == wanted
    assert cache.get_seq_length() == tokens


def test_sequences_are_asked_one_question_each(model, store, seams):
    first, second = store.add_texts(TEXTS, seams), store.add_texts(TEXTS[:1], seams)
    both = assemble(model, [first, second], boundary="all")
    alone = [assemble(model, parts, boundary="all") for parts in (first, second)]
    wanted = [ask(model, one, question, seams, **NEW) for one, question in zip(alone, QUESTIONS, strict=False)]
    assert ask(model, both, QUESTIONS[:2], seams, **NEW) == wanted
    with pytest.raises(ValueError, match="3 suffixes for 2 sequences"):
        ask(model, both, QUESTIONS, seams, **NEW)


def test_what_is_off_is_told(model, cache, seams):
    with pytest.raises(ValueError, match="batch_size=0"):
        list(answers(model, cache, torch.zeros(1, 3, dtype=torch.long), [[1]], 0))
    with pytest.raises(ValueError, match="num_return_sequences=2: an answer is one text"):
        ask(model, cache, QUESTIONS, seams, num_return_sequences=2, **NEW)
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        generated(model, {}, return_dict_in_generate=True)


def test_a_cache_that_was_not_assembled_is_told(model, store, seams):
    with pytest.raises(TypeError, match="ask takes a cache of assemble, and got a RedKnotCache"):
        ask(model, RedKnotCache(model.config, store.plan), QUESTIONS[0], seams)


@pytest.mark.parametrize("ids", [[-5, 6], [5, 99_999]])
def test_ids_that_the_model_does_not_know_are_told(store, ids):
    with pytest.raises(ValueError, match=r"the text has ids from .*: the model knows 0 to"):
        store.add(ids)
