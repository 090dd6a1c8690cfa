"""Caches that travel between two processes, over gloo and through a store: exact, and no more than is kept."""

import json
from pathlib import Path

import pytest
import torch
from oracle import random_plan
from services import run_ranks
from texts import prompts
from transfer_worker import FAMILIES, LONG, NEW, conversation, long_model, long_plan, model_of

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, SegmentStore, cache_argument
from redknot_hf.reuse.transfer import as_span, park, resume

WORKER = Path(__file__).with_name("transfer_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("transfer")
    run_ranks(WORKER, folder)
    return folder


def found(folder, rank: int) -> dict:
    return json.loads((folder / f"{rank}.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_in_another_process(folder, family):
    model, plan = model_of(family)
    ids, mask = prompts(2, 50, (0, 9))
    alone, _ = conversation(model, RedKnotCache(model.config, plan, page_size=16), ids, mask, 2 * NEW)
    there = found(folder, 1)[family]
    assert there["exact"] == [True, True]
    assert there["tokens"] == [alone.tolist()] * 2  # behind what was sent, and behind a pickle's


def test_only_what_the_plan_keeps_is_on_the_wire(folder):
    wire = {found(folder, rank)["wire"] for rank in range(2)}
    config = long_model().config
    assert len(wire) == 1
    (wire,) = wire
    planned = long_plan(config).nbytes(LONG, config, "float32")
    assert planned <= wire <= 1.02 * planned
    assert wire < 0.2 * HeadPlan.uniform(config, HeadSpec()).nbytes(LONG, config, "float32")


def test_what_is_no_cache_is_refused(folder):
    empty, garbage, half, few, full = found(folder, 1)["refused"]
    assert "header of 0 bytes" in empty
    assert "no cache: JSONDecodeError" in garbage
    assert "no cache: KeyError" in half
    assert "announces 99 bytes of data for spans of 0" in few
    assert "extend an empty cache" in full


def test_a_cache_parked_in_a_store_is_resumed_elsewhere(folder):
    there = found(folder, 1)["parked"]
    assert there == {"address": found(folder, 0)["parked"], "computed": 0, "exact": True}


@pytest.fixture(scope="module")
def model():
    return model_of("gemma4")[0]


@pytest.mark.parametrize("storage", ["model", "int8"])
def test_what_is_parked_is_what_is_read(model, storage):
    """A parked text is the segment that the store would have made of it, and what it made is resumed alike."""
    plan, ids = random_plan(model.config), prompts(1, 40, (0,))[0]
    cache = RedKnotCache(model.config, plan, page_size=16)
    with torch.no_grad():
        model(ids, use_cache=True, **cache_argument(model, cache))
    parked, made = (SegmentStore(model, plan, storage=storage) for _ in range(2))
    (ref,) = park(cache, ids, parked)
    assert ref in parked
    assert made.add(ids) == ref
    assert parked.counts.computed == 0
    spans = [as_span(store.get(ref)) for store in (parked, made)]
    torch.testing.assert_close(spans[0].data, spans[1].data, atol=1e-4 if storage == "model" else 0.1, rtol=1e-4)
    mask = torch.ones(1, 41, dtype=torch.long)
    text = torch.cat([ids, ids[:, :1]], 1)
    want, _ = conversation(model, RedKnotCache(model.config, plan), text, mask, 6)
    for store in (parked, made) if storage == "model" else ():
        got, _ = conversation(model, resume(store.ref(ids), store), text, mask, 6)
        assert torch.equal(got, want)


def test_what_cannot_be_parked_or_resumed_is_refused(model):
    plan, ids = random_plan(model.config), prompts(1, 40, (0,))[0]
    cache = RedKnotCache(model.config, plan)
    store = SegmentStore(model, plan)
    with pytest.raises(ValueError, match="holds nothing"):
        park(cache, ids, store)
    with torch.no_grad():
        model(ids, use_cache=True, **cache_argument(model, cache))
    with pytest.raises(ValueError, match="a span of 40 tokens cannot stand for a text of 39"):
        park(cache, ids[:, 1:], store)
    with pytest.raises(ValueError, match="another plan"):
        park(cache, ids, SegmentStore(model, random_plan(model.config, seed=1)))
    with pytest.raises(ValueError, match="1 sequences"):
        park(cache, [[1], [2]], store)
    with pytest.raises(ValueError, match="keeps 'full'"):
        park(cache, ids, SegmentStore(model, plan, keep="full"))
    with pytest.raises(ValueError, match="behind 2 tokens"):
        resume([store.add([5, 6], [1, 2])], store)
