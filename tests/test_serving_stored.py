"""Engines hold plans in int8 and int4: the tokens of generate with the same plan, and pages of both pools counted."""

import numpy as np
import pytest
import torch
from families import make_model
from served import SIZES, all_free, alone, planned_here_and_there, prompts_of

from redknot_hf import RedKnotCache, cache_argument
from redknot_hf.serving import Engine, Sampling
from redknot_hf.serving.host import Away
from redknot_hf.serving.load import Load
from redknot_hf.serving.memory import SeatMemory
from redknot_hf.serving.pages import missing, needed, page_bytes
from redknot_hf.serving.request import Request
from redknot_hf.serving.scheduler import Sequence
from redknot_hf.serving.stepping import ColdCounts

# Prompts are read whole: in further chunks they would see what has grown cold, as `generate` with such chunks does.
LONG = SIZES | {"max_len": 320, "chunk": 2048, "memory": 1 << 23}


def plan_of(model):
    """Heads in int8 and int4, others that keep everything or a window, in one layer and in several."""
    plan, middle, last = planned_here_and_there(model)
    return plan.stored("int8", heads=[(1, 0), last]).stored("int4", heads=[middle])


def long_prompts(seed, count):
    """Random prompts that grow cold, and short ones."""
    (first, *others), draw = prompts_of(seed, count + 1)
    return [(first * 9)[: draw.randint(100, 90 + 130)] + x for x in others[:count]], draw


def plan_names(engine):
    """The storages of heads that the model lets see everything, and that have keys of their own."""
    return {name for storage in engine.memory.layers.values() for name in storage.cold.nbytes}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gpt_oss"])
def test_tokens_are_those_of_generate(family):
    model = make_model(family)
    plan = plan_of(model)
    prompts, draw = long_prompts(1, 3)
    new = [draw.randint(12, 20) for _ in prompts]
    expected = [alone(model, plan, p, n) for p, n in zip(prompts, new, strict=True)]
    engine = Engine(model, plan, **LONG | {"parked": 0})
    asked = []
    for prompt, count in zip(prompts, new, strict=True):
        asked.append(engine.submit(prompt, Sampling(count)))
        engine.step()
    cold = [x.held.layers[i].storage.cold.counts.max() for x in engine.scheduler.running for i in engine.memory.layers]
    assert max(cold) > 0
    assert plan_names(engine)
    assert {("global", name) for name in plan_names(engine)} <= set(Load.of(engine).held)
    assert engine.drain()
    assert [x.result() for x in asked] == expected
    assert all_free(engine)


@pytest.mark.parametrize("chunk", [16, 40])
def test_chunks_are_those_of_generate(model, chunk):
    plan, (prompt, *_) = plan_of(model), long_prompts(2, 1)[0]
    engine = Engine(model, plan, **LONG | {"chunk": chunk, "parked": 0})
    assert engine.generate([prompt], Sampling(9))[0].ids == alone(model, plan, prompt, 9, prefill_chunk_size=chunk)
    assert all_free(engine)


def test_swapped_sequences_go_on_as_if_nothing_had_been(model):
    plan = plan_of(model)
    prompts, _ = long_prompts(3, 3)
    new = [45, 30, 20]
    expected = [alone(model, plan, p, n) for p, n in zip(prompts, new, strict=True)]
    most = SeatMemory(model, plan, 1 << 23, 3, 320, page_size=16).needs(280)
    engine = Engine(model, plan, **LONG | {"memory": int(2.4 * most), "parked": 0})
    engine.scheduler.ahead = 1
    low = [engine.submit(p, Sampling(n)) for p, n in zip(prompts[:2], new, strict=False)]
    for _ in range(15):
        engine.step()
    high = engine.submit(prompts[2], Sampling(new[2]), priority=1)
    engine.step()
    assert engine.memory.used()["host"] > 0
    engine.drain()
    assert [x.result() for x in (*low, high)] == expected
    assert engine.scheduler.preemptions == {"swap": 1, "recompute": 0}
    assert all_free(engine)


def read(held, tokens, cut=0):
    """A sequence of an engine's memory that has read these tokens."""
    sequence = Sequence(Request(tokens, Sampling(9)), [*tokens, 5])
    held.begin(sequence)
    held.grow(sequence, len(tokens) + cut)
    with torch.no_grad():
        held.model(torch.tensor([tokens]), use_cache=True, **{held.name: sequence.held})
    sequence.done = len(tokens)
    return sequence


def everything(held, sequence):
    """Positions that rows hold, tables put aside, and what the pages say of them."""
    found = []
    for i in held.layers:
        storage = sequence.held.layers[i].storage
        for head in range(storage.rows.rules.heads):
            at = storage.rows.positions_held(0, head)
            found.append((at, *storage.read(0, np.full(len(at), head), at)))
        found.append((storage.cold.counts, torch.tensor(storage.history.slots), torch.tensor(0)))
    return found


def test_what_comes_back_from_the_host_is_what_went(model):
    plan, (prompt, *_) = plan_of(model), long_prompts(4, 1)[0]
    held = SeatMemory(model, plan, 1 << 23, 3, 320, page_size=16, host=1 << 20)
    other, sequence = read(held, prompt[:50]), read(held, prompt, cut=64)
    before, used = everything(held, sequence), held.used()["used"]
    assert held.swap_out(sequence)
    sequence.swapped = True
    assert isinstance(sequence.held, Away)
    assert held.used()["host"] == held.host_used == sequence.held.nbytes
    assert sequence.held.nbytes == pytest.approx(held.needs(len(prompt)), rel=0.02)  # and nothing that was reserved
    assert held.fits(sequence, len(prompt) + 64)
    again = read(held, prompt)  # in pages that were its own
    held.swap_in(sequence)
    held.grow(sequence, len(prompt) + 64)
    for old, new in zip(before, everything(held, sequence), strict=True):
        assert np.array_equal(old[0], new[0])
        assert all(torch.equal(a, b) for a, b in zip(old[1:], new[1:], strict=True))
    held.release(again)
    sequence.swapped = False
    assert held.used()["used"] == used
    assert held.host_used == 0
    full = SeatMemory(model, plan, 1 << 23, 3, 320, page_size=16, host=1000)
    assert not full.swap_out(read(full, prompt))
    for x in (other, sequence):
        held.release(x)
    assert held.used()["used"] == 0


def test_forks_and_prefixes_share_what_is_cold(model):
    plan, (prompt, *_) = plan_of(model), long_prompts(5, 1)[0]
    engine = Engine(model, plan, **LONG)
    options = {"do_sample": True, "temperature": 1.2, "top_k": 0}
    asked = engine.submit_many(prompt, 3, Sampling(12, temperature=1.2, seed=7))
    engine.drain()
    assert asked[0].ids == alone(model, plan, prompt, 12, 7, **options)
    cache = RedKnotCache(model.config, plan, page_size=16)
    with torch.no_grad():  # the others go on from all but the last token
        model(torch.tensor([prompt]), **cache_argument(model, cache))
    cache.crop(-1)
    for i, request in enumerate(asked[1:], 1):
        torch.manual_seed(7 + i)
        out = model.generate(torch.tensor([prompt]), past_key_values=cache.fork(), max_new_tokens=12, **options)
        assert request.ids == out[0, len(prompt) :].tolist()
    assert engine.reader.read == len(prompt) + 2
    assert all_free(engine)


def test_any_mix_under_pressure_ends_with_all_pages_free(model):
    """What is read again need not be what was decoded, to the last bit; but every request is served to its end."""
    plan = plan_of(model)
    prompts, draw = long_prompts(6, 6)
    most = SeatMemory(model, plan, 1 << 23, 3, 320, page_size=16).needs(280)
    for preempt in ("swap", "recompute"):
        engine = Engine(model, plan, **LONG | {"memory": int(2.2 * most), "preempt": preempt, "chunk": 64})
        engine.scheduler.ahead = 1
        asked = []
        for i, prompt in enumerate(prompts[:4]):
            asked += engine.submit_many(prompt, 1 + i // 3, Sampling(12), priority=i // 2)
            for _ in range(draw.randint(0, 6)):
                engine.step()
        asked[-1].cancel()
        engine.drain()
        assert all(len(x.ids) == 12 for x in asked if not x.cancelling)
        assert sum(engine.scheduler.preemptions.values()) > 0
        assert all_free(engine)


def test_a_budget_is_shared_out_among_both_kinds_of_pages(model):
    plan = plan_of(model)
    held = SeatMemory(model, plan, 1 << 20, 3, 4096, page_size=16)
    assert held.used()["total"] == held.sizes.nbytes <= 1 << 20
    assert held.sizes.nbytes > 0.9 * (1 << 20)
    bare = RedKnotCache(model.config, plan, page_size=16)
    with torch.no_grad():
        model(torch.arange(3, 97).repeat(4)[None, :300], **cache_argument(model, bare))
    by_name = bare.nbytes_by_storage
    found = {}
    for storage in held.layers.values():
        for part, name in zip(storage.held(300), ("model", *storage.cold.nbytes), strict=True):
            found[name] = found.get(name, 0) + needed(part) * page_bytes(part.pool)
            assert missing(part) == needed(part)
    assert found.keys() == by_name.keys()
    for name, nbytes in found.items():
        assert nbytes <= by_name[name] <= 1.3 * nbytes  # which has pages to grow
    assert held.needs(300) == sum(found.values())
    assert not held.ever_fits(40_000)
    counts = ColdCounts(held.layers, 2, torch.device("cpu"))
    counts.set(torch.tensor([3, 7], dtype=torch.int32))
    assert counts.of[1].tolist() == [[3, 0, 0, 0], [7, 0, 0, 0]]
    assert sorted(counts.of) == [1, 2, 3]
