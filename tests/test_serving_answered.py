"""Answers that one engine has begun and another ends: as if one had given them whole."""

import inspect

import pytest
from families import make_model
from served import SIZES, all_free, plan_of, prompts_of

from redknot_hf import SegmentStore
from redknot_hf.serving import Engine, Sampling, State
from redknot_hf.serving.admission import check_answered

NEW = 14
ASKED = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 5},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    "seeded and penalised": {"temperature": 1.1, "seed": 9, "frequency_penalty": 1.0},
}


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def engine_of(model, store=None):
    return Engine(model, plan_of(model), store=store, **SIZES)


def answered_by(engine, prompt, sampling, answered=(), **options):
    told = []
    callback = lambda request, token: told.append(token)  # noqa: E731
    request = engine.submit(prompt, sampling, answered=answered, callback=callback, **options)
    engine.drain()
    return request, [token.id for token in told if token is not None]


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_another_engine_goes_on_with_the_same_tokens(model, asked):
    prompt, sampling = prompts_of(1, 2)[0][-1], Sampling(max_new_tokens=NEW, **asked)
    whole = answered_by(engine_of(model), prompt, sampling)[0].result()
    for begun in (1, 6, NEW - 1):
        engine = engine_of(model)
        request, told = answered_by(engine, prompt, sampling, whole[:begun])
        assert request.result() == whole
        assert told == whole[begun:], "what was answered before is not told again"
        assert engine.reader.decoded <= NEW - begun
        assert all_free(engine)


def test_behind_documents_too(model):
    documents, question = prompts_of(2, 3)[0][:2], [7, 8, 9]
    documents = [document * 3 for document in documents]
    store = SegmentStore(model, plan_of(model), page_size=16)
    refs, sampling = store.add_all(documents), Sampling(max_new_tokens=NEW)
    whole = answered_by(engine_of(model, store), question, sampling, segments=refs)[0].result()
    assert answered_by(engine_of(model, store), question, sampling, whole[:5], segments=refs)[0].result() == whole


def test_an_answer_that_was_whole_ends_at_once(model):
    prompt = prompts_of(1, 2)[0][-1]
    whole = answered_by(engine_of(model), prompt, Sampling(max_new_tokens=4))[0].result()
    for sampling, reason in ((Sampling(4), "length"), (Sampling(9, stop_ids=whole[3:]), "stop")):
        engine = engine_of(model)
        request, told = answered_by(engine, prompt, sampling, whole)
        assert (request.state, request.reason, request.result(), told) == (State.DONE, reason, whole, [])
        assert engine.steps == 0


@pytest.mark.parametrize(
    ("answered", "n", "match"),
    [([1, 2], 2, "ask for each by itself"), ([1] * 5, 1, "which counts them"), ([10_000], 1, "the model knows 0 to")],
)
def test_what_cannot_go_on_is_refused(model, answered, n, match):
    with pytest.raises(ValueError, match=match):
        engine_of(model).submit_many([1, 2, 3], n, Sampling(max_new_tokens=4), answered=answered)


def test_what_is_no_beginning_is_told():
    for answered in ("text", [1.5]):
        with pytest.raises(TypeError, match=r"give the \.ids of the request"):  # past the annotations, as users are
            inspect.unwrap(check_answered)(answered, Sampling(), 1, 97)
