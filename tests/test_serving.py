"""Served requests get the tokens of `generate` with the same plan, whatever else is served beside them."""

import pytest
import torch
from families import FAMILIES, make_model
from served import SIZES, all_free, alone, plan_of, prompts_of

from redknot_hf import RedKnotCache
from redknot_hf.serving import Engine, Sampling, State


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.mark.parametrize("local", [False, pytest.param(True, marks=pytest.mark.core)], ids=["global", "local"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family, local):
    model = make_model(family)
    plan = plan_of(model, local)
    prompts, draw = prompts_of(1, 3)  # more than have a seat
    new = [draw.randint(1, 12) for _ in prompts]
    expected = [alone(model, plan, p, n) for p, n in zip(prompts, new, strict=True)]
    engine = Engine(model, plan, **SIZES)
    answers = engine.generate(prompts, [Sampling(max_new_tokens=n) for n in new])
    assert [x.ids for x in answers] == expected
    assert all(x.state is State.DONE and x.reason == "length" for x in answers)
    assert all_free(engine)


@pytest.mark.pairs
@pytest.mark.parametrize("preempt", ["swap", "recompute", None])
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("seed", range(2))
def test_any_mix_of_arrivals_chunks_and_preemptions(model, preempt, local, seed):
    plan = plan_of(model, local)
    prompts, draw = prompts_of(seed, 6)
    asked = [
        Sampling(max_new_tokens=draw.randint(1, 40), temperature=draw.choice((0, 0.8)), seed=i)
        for i in range(len(prompts))
    ]
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0}
    expected = [
        alone(model, plan, p, s.max_new_tokens, s.seed, **(options if s.temperature else {}))
        for p, s in zip(prompts, asked, strict=True)
    ]
    chunk, parked = draw.choice((5, 16, 40)), draw.choice((0, 0.5))
    memory = 180_000 if local else 215_000
    engine = Engine(model, plan, **SIZES | {"memory": memory, "chunk": chunk, "preempt": preempt, "parked": parked})
    engine.scheduler.ahead = 1
    found = []
    for prompt, how in zip(prompts, asked, strict=True):
        found.append(engine.submit(prompt, how, priority=draw.choice((0, 0, 1))))
        for _ in range(draw.randint(0, 6)):
            engine.step()
    assert engine.drain()
    assert [x.result() for x in found] == expected
    assert all_free(engine)
    counted = engine.scheduler.preemptions
    assert sum(counted.values()) == sum(x.preempted for x in found)
    if preempt is None:
        assert not any(counted.values())


@pytest.mark.parametrize("preempt", ["swap", "recompute"])
def test_preempted_sequences_go_on_as_if_nothing_had_been(model, preempt):
    plan = plan_of(model)
    prompts, _ = prompts_of(3, 4, longest=60)
    expected = [alone(model, plan, p, 50) for p in prompts]
    engine = Engine(model, plan, **SIZES | {"memory": 200_000, "preempt": preempt, "parked": 0})
    engine.scheduler.ahead = 1
    low = [engine.submit(p, Sampling(max_new_tokens=50)) for p in prompts[1:]]
    for _ in range(20):
        engine.step()
    high = engine.submit(prompts[0], Sampling(max_new_tokens=50), priority=1)
    engine.drain()
    assert [x.result() for x in (high, *low)] == expected
    assert engine.scheduler.preemptions[preempt] > 0
    assert all_free(engine)


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_prefixes_are_read_once(model, local):
    plan = plan_of(model, local)
    prompts, _ = prompts_of(9, 6)
    shared = prompts[0] + prompts[1] + prompts[2]
    texts = [shared, shared, shared + prompts[3], shared[:-3] + prompts[4]]
    expected = [alone(model, plan, p, 9) for p in texts]
    engine = Engine(model, plan, **SIZES)
    first = engine.generate([shared], Sampling(max_new_tokens=9))[0]
    read = engine.reader.read
    again = engine.generate(texts[1:], Sampling(max_new_tokens=9))
    assert [first.ids, *(x.ids for x in again)] == expected
    assert [x.cached for x in again] == [len(shared) - 1, len(shared), len(shared) - 3]
    assert engine.reader.read - read == 1 + len(prompts[3]) + len(prompts[4])
    assert all_free(engine)


def test_a_prefix_is_not_used_where_rings_have_lost_it(model):
    prompts, _ = prompts_of(5, 6)
    shared = prompts[0] + prompts[1] + prompts[2]
    short = shared[:-60] + prompts[3]
    for local, cached in ((True, 0), (False, len(shared) - 60)):
        plan = plan_of(model, local)
        engine = Engine(model, plan, **SIZES | {"chunk": 200})
        engine.generate([shared], Sampling(max_new_tokens=1))
        answer = engine.generate([short], Sampling(max_new_tokens=6))[0]
        assert answer.ids == alone(model, plan, short, 6)
        assert answer.cached == cached


def test_answers_to_one_prompt_are_forks(model):
    plan, prompt = plan_of(model), prompts_of(6, 2)[0][-1]
    engine = Engine(model, plan, **SIZES)
    asked = engine.submit_many(prompt, 4, Sampling(max_new_tokens=12, temperature=1.2, seed=7))
    engine.drain()
    options = {"do_sample": True, "temperature": 1.2, "top_k": 0}
    assert [x.ids for x in asked] == [alone(model, plan, prompt, 12, 7 + i, **options) for i in range(4)]
    assert engine.reader.read == len(prompt) + 3
    assert all_free(engine)


def test_a_prompt_goes_on_from_a_span_that_was_made_elsewhere(model):
    plan, prompt = plan_of(model), prompts_of(8, 2)[0][-1]
    cache = RedKnotCache(model.config, plan, page_size=16)
    model.generate(torch.tensor([prompt[:40]]), past_key_values=cache, max_new_tokens=1, do_sample=False)
    (span,) = cache.spans()
    engine = Engine(model, plan, **SIZES)
    request = engine.submit(prompt, Sampling(max_new_tokens=9), source=lambda: span)
    engine.drain()
    assert request.result() == alone(model, plan, prompt, 9)
    assert request.cached == 40
    assert engine.reader.read == len(prompt) - 40
    assert all_free(engine)
