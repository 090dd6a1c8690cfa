"""The engine on an accelerator: steps of decoding as graphs, tokens of generate, pages to the host and back."""

import pytest
import torch
from families import VOCABULARY, make_model
from served import SIZES, all_free, kept_after_its_end, planned_here_and_there

from redknot_hf import RedKnotCache, SegmentStore, assemble, prompt
from redknot_hf.serving import Engine, Sampling
from redknot_hf.serving.capturing import CapturedStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")]

LONG = SIZES | {"max_len": 512, "chunk": 2048, "memory": 1 << 25, "impl": "triton"}
FAMILIES = ["llama", "gemma2", "gemma3", "gemma4", "gpt_oss", "phi3"]


def texts(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 260, (count,), generator=draw).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


def plan_of(model, stored):
    """Some heads that keep everything, in the model's dtype or in int8 and int4, and others with windows."""
    plan, middle, last = planned_here_and_there(model)
    if stored:
        plan = plan.stored("int8", heads=[(1, 0), last]).stored("int4", heads=[middle])
    return plan


def alone(model, plan, ids, new):
    cache = RedKnotCache(model.config, plan, page_size=16, impl="triton")
    asked = torch.tensor([ids], device="cuda")
    out = model.generate(asked, past_key_values=cache, max_new_tokens=new, do_sample=False)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("stored", [False, True], ids=["model", "stored"])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_have_the_tokens_of_steps_one_by_one_and_of_generate(family, stored):
    model = make_model(family).cuda()
    plan, asked = plan_of(model, stored), texts(5)
    found = []
    for capture in (True, False):
        engine = Engine(model, plan, **LONG | {"capture": capture, "parked": 0})
        found.append([x.ids for x in engine.generate(asked, Sampling(40))])
        seats = engine.reader.seats
        assert bool(seats.replays) == seats.captures == capture
        assert all(isinstance(step, CapturedStep) for step in seats.graphs.values())
        assert all_free(engine)
    assert found[0] == found[1] == [alone(model, plan, x, 40) for x in asked]


@pytest.mark.parametrize("stored", [False, True], ids=["model", "stored"])
def test_compiled_steps_have_the_tokens_of_generate(stored):
    model = make_model("llama").cuda()
    plan, asked = plan_of(model, stored), texts(5, seed=5)
    engine = Engine(model, plan, **LONG | {"compiled": True, "parked": 0})
    answers = engine.generate(asked, Sampling(40))
    assert [x.ids for x in answers] == [alone(model, plan, x, 40) for x in asked]
    assert list(engine.reader.seats.graphs) == [LONG["max_batch"]]
    assert all_free(engine)
    assert not kept_after_its_end(engine)


def test_an_engine_that_has_ended_gives_its_memory_back():
    model, held = make_model("llama").cuda(), []
    for _ in range(2):  # libraries take memory for good, the first time
        engine = Engine(model, plan_of(model, True), **LONG | {"memory": 1 << 28})
        pages = engine.memory.used()["total"]
        engine.generate(texts(5), Sampling(9))
        assert engine.reader.seats.graphs
        assert not kept_after_its_end(engine)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert pages > 1 << 20
    assert held[1] - held[0] < pages // 4


@pytest.mark.parametrize("stored", [False, True], ids=["model", "stored"])
@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_ends_of_prompts_are_read_by_graphs(family, stored):
    model = make_model(family).cuda()
    plan, (text, *_) = plan_of(model, stored), texts(1, seed=6)
    asked = [text[i : i + n] for i, n in enumerate((3, 16, 1, 9, 12, 16, 5, 8, 2))]
    engine = Engine(model, plan, **LONG | {"max_batch": len(asked), "parked": 0})
    answers = engine.generate(asked, Sampling(20))
    assert [x.ids for x in answers] == [alone(model, plan, x, 20) for x in asked]
    assert {*engine.reader.seats.readings} == {1, 8}
    assert all_free(engine)


@pytest.mark.parametrize("stored", [False, True], ids=["model", "stored"])
def test_seats_that_come_and_go_between_replays(stored):
    model = make_model("llama").cuda()
    plan, asked = plan_of(model, stored), texts(8, seed=1)
    new = [5, 40, 17, 3, 60, 25, 9, 33]
    engine = Engine(model, plan, **LONG | {"max_batch": 3, "parked": 0})
    requests = []
    for ids, count in zip(asked, new, strict=True):
        requests.append(engine.submit(ids, Sampling(count)))
        for _ in range(4):
            engine.step()
    assert engine.drain()
    assert [x.result() for x in requests] == [alone(model, plan, x, n) for x, n in zip(asked, new, strict=True)]
    assert engine.reader.seats.replays > 20
    assert all_free(engine)


@pytest.mark.parametrize("stored", [False, True], ids=["model", "stored"])
def test_sequences_go_to_pinned_memory_and_back(stored):
    model = make_model("llama").cuda()
    plan, asked = plan_of(model, stored), texts(2, seed=2)
    engine = Engine(model, plan, **LONG | {"max_batch": 1, "parked": 0})
    low = engine.submit(asked[0], Sampling(50))
    for _ in range(20):
        engine.step()
    high = engine.submit(asked[1], Sampling(10), priority=1)
    assert engine.drain()
    assert engine.scheduler.preemptions == {"swap": 1, "recompute": 0}
    assert low.result() == alone(model, plan, asked[0], 50)
    assert high.result() == alone(model, plan, asked[1], 10)
    assert all_free(engine)


def test_requests_with_segments_beside_replays():
    model = make_model("llama").cuda()
    plan = plan_of(model, stored=False)
    store = SegmentStore(model, plan)
    refs, (end, other) = store.add_all(texts(3, seed=3)), texts(2, seed=4)
    engine = Engine(model, plan, store=store, **LONG | {"max_len": 1200})
    before = engine.submit(other, Sampling(30))
    engine.step()
    request = engine.submit(end, Sampling(20), segments=[x.address for x in refs], boundary=0.2)
    assert engine.drain()
    cache = assemble(model, refs, boundary=0.2, page_size=16, impl="triton")
    out = model.generate(**prompt(cache, end), max_new_tokens=20, do_sample=False)
    assert request.result() == out[0, -20:].tolist()
    assert before.result() == alone(model, plan, other, 30)
    assert all_free(engine)
