"""RedKnotCache under plans that store heads in fewer bits: every family, chunks, captured steps, and what it tells."""

import copy
import pickle
from typing import Any

import pytest
import torch
from families import FAMILIES, make_model
from layers import feed
from texts import prompts, some_ids
from watched import HOT, PAGE, stored_plan, watch

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

CORE = "llama", "gemma3", "gemma3n", "gpt_oss"
families = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.core if f in CORE else ()) for f in FAMILIES]
)


@families
def test_every_step_of_every_layer_is_dense_attention_over_what_the_rows_hold(family, monkeypatch):
    seen = watch(monkeypatch)
    model = make_model(family)
    ids, mask = prompts(2, 90, padding=(0, 9))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = RedKnotCache(model.config, stored_plan(model.config), page_size=PAGE, hot=HOT)
    with torch.no_grad():
        for start, stop in [(0, 60), (60, 70), (70, 87), *((i, i + 1) for i in range(87, 90))]:
            step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            model(ids[:, start:stop], **cache_argument(model, cache), **step)
    some = any(storage.rows.rules.stored_heads for storage in cache._storages())
    assert some == (family != "mistral_sliding")  # the model's own window bounds what its heads keep
    assert max(seen) == ((90 - HOT) // PAGE - 1 if some else 0)


# Triton's interpreter takes its time; kernels/tests/test_cold.py holds it to the twin in small.
NEAR = [(s, "torch", r) for s in ("int8", "int4") for r in (None, 128)]
NEAR += [("int8", "triton", 128), ("int4", "triton", None)]


@pytest.mark.parametrize(("storage", "impl", "reserved"), NEAR)
def test_answers_are_near_those_of_full_pages(storage, impl, reserved):
    small = impl == "triton"
    model, ids = make_model("llama", num_hidden_layers=1 if small else 2), some_ids(1 if small else 2, 110)
    plan = HeadPlan.uniform(model.config, HeadSpec())
    caches = [
        RedKnotCache(model.config, p, page_size=PAGE, hot=HOT, impl=of, max_cache_len=reserved)
        for p, of in ((plan, "torch"), (plan.stored(storage), impl))
    ]
    full, stored = (torch.cat([feed(model, c, part) for part in ids.split([80, 15, 15], 1)], 1) for c in caches)
    error = (full - stored)[:, 80:].norm() / full[:, 80:].norm()
    assert 0 < error < {"int8": 0.03, "int4": 0.4}[storage]
    torch.testing.assert_close(stored[:, :80], full[:, :80])  # the first step sees itself as it is


@pytest.mark.parametrize("reserved", [None, 160])
def test_copies_forks_pickles_and_the_host_go_on_alike(reserved):
    model, ids = make_model("llama"), some_ids(2, 120)
    cache = RedKnotCache(
        model.config, stored_plan(model.config), page_size=PAGE, hot=HOT, impl="torch", max_cache_len=reserved
    )
    feed(model, cache, ids[:, :90])
    others = [cache.fork(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    others[0].offload()
    wanted = feed(model, cache, ids[:, 90:])
    for other in others:
        torch.testing.assert_close(feed(model, other, ids[:, 90:]), wanted)
    cache.crop(-10)
    again = feed(model, cache, ids[:, 110:])  # over pages that have grown cold since
    assert (again - wanted[:, 20:]).norm() < 0.1 * again.norm()
    with pytest.raises(ValueError, match="beyond what local heads keep behind windows, or what stored heads keep"):
        cache.crop(-60)


def test_beams_and_assisted_decoding_run():
    model: Any
    model, ids = make_model("llama"), some_ids(1, 70)
    plan = stored_plan(model.config)
    options = {"max_new_tokens": 40, "do_sample": False}
    one = lambda: RedKnotCache(model.config, plan, page_size=PAGE, hot=HOT)  # noqa: E731
    beams = model.generate(ids, past_key_values=one(), num_beams=3, **options)
    assert torch.as_tensor(beams).shape == (1, 110)
    assisted = model.generate(ids, past_key_values=one(), prompt_lookup_num_tokens=3, **options)
    assert torch.as_tensor(assisted).shape == (1, 110)


def test_spans_hold_what_was_cold_and_grow_cold_again():
    model, ids = make_model("llama"), some_ids(1, 110)
    plan = stored_plan(model.config)
    cache, other = (RedKnotCache(model.config, plan, page_size=PAGE, hot=HOT) for _ in range(2))
    feed(model, cache, ids[:, :90])
    other.extend(cache.spans())
    assert other.get_seq_length() == 90
    for a, b in zip(cache._storages(), other._storages(), strict=True):
        assert (a.cold.counts == b.cold.counts).all()
    wanted, found = (feed(model, one, ids[:, 90:]) for one in (cache, other))
    assert (wanted - found).norm() < 0.1 * wanted.norm()


def test_bytes_are_told_by_storage():
    model, ids = make_model("llama"), some_ids(1, 200)
    plan = HeadPlan.uniform(model.config, HeadSpec()).stored("int8", heads=[(0, 0)])
    plan = plan.stored("int4", heads=[(1, 2)])
    cache = RedKnotCache(model.config, plan, page_size=PAGE, hot=HOT)
    feed(model, cache, ids)
    told = cache.nbytes_by_storage
    assert set(told) == {"model", "int8", "int4"}
    assert sum(told.values()) == cache.nbytes
    assert "KiB int8" in repr(cache)
    with pytest.raises(ValueError, match="hot=-1"):
        RedKnotCache(model.config, plan, hot=-1)
