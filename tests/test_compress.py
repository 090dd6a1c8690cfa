"""A filled cache made to obey a narrower plan: what stays is what was there, and the bytes are really gone."""

import numpy as np
import pytest
import torch
from families import make_model
from layers import feed, held
from oracle import random_plan
from texts import prompts, some_ids
from watched import HOT, PAGE, stored_plan, watch

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument
from redknot_hf.plan.growth import refuse_growth

FAMILIES = ["llama", "gemma3", "gemma3n", "gemma4", "gpt_oss", "mistral_sliding"]
NARROWER = {"windows": random_plan, "storages": stored_plan}


# The interpreter is slow, and rules are the same in every family.
@pytest.mark.parametrize("narrower", NARROWER)
@pytest.mark.parametrize(("family", "impl"), [*((f, "torch") for f in FAMILIES), ("llama", "triton")])
def test_later_steps_see_what_was_there_under_the_new_plan(family, impl, narrower, monkeypatch):
    seen = watch(monkeypatch)
    model = make_model(family, **({"num_hidden_layers": 2} if impl == "triton" else {}))
    plan = NARROWER[narrower](model.config)
    ids, mask = prompts(2, 90, padding=(0, 9))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = HeadPlan.uniform(model.config, HeadSpec())
    cache = RedKnotCache(model.config, whole, page_size=PAGE, hot=HOT, impl=impl)

    @torch.no_grad()
    def read(cache, start, stop):
        step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        return model(ids[:, start:stop], **cache_argument(model, cache), **step).logits

    read(cache, 0, 80)
    fork, before = cache.fork(), held(cache)
    cache.compress(plan)
    after = held(cache)
    for row, (at, *tensors) in after.items():
        positions_before, *old = before[row]
        known = np.isin(at, positions_before)
        reach = cache._storages()[row[0]].rows.rules.reach
        assert (at[~known] <= 80 - 9 * row[1] - reach).all()  # sinks that the model's own window hides
        at, tensors = at[known], [x[known] for x in tensors]
        where = np.searchsorted(positions_before, at)
        for ours, theirs in zip(tensors, old, strict=True):
            error = (ours - theirs[where]).norm()
            assert error <= (0 if narrower == "windows" else 0.2) * theirs[where].norm()
    assert cache.plan == plan
    seen.clear()
    for start, stop in [(80, 87), (87, 88), (88, 90)]:
        read(cache, start, stop)
    assert seen
    again = held(fork)  # the fork holds what it held
    for row, (at, *tensors) in before.items():
        assert (again[row][0] == at).all()
        assert all(map(torch.equal, again[row][1:], tensors))
    assert fork.plan == whole


@pytest.mark.parametrize("plan", ["windows", "int8", "int4"])
def test_bytes_are_given_back(plan):
    model = make_model("llama")
    whole = HeadPlan.uniform(model.config, HeadSpec())
    narrow = HeadPlan.with_global(model.config, [(0, 0)], HeadSpec(16, 2)) if plan == "windows" else whole.stored(plan)
    cache = RedKnotCache(model.config, whole, page_size=PAGE, hot=HOT)
    feed(model, cache, some_ids(2, 700))
    before = sum(part.untyped_storage().nbytes() for s in cache._storages() for part in (*s.pool.pages,))
    assert before == cache.nbytes
    cache.compress(narrow)
    pools = [part for s in cache._storages() for part in (*s.pool.pages, *s.cold.pages)]
    resident = sum(part.untyped_storage().nbytes() for part in pools)
    assert resident == cache.nbytes
    made = RedKnotCache(model.config, narrow, page_size=PAGE, hot=HOT)
    for part in some_ids(2, 700).split(100, 1):
        feed(model, made, part)
    rows = len(cache.layers) * 2 * 4
    assert resident <= made.nbytes + rows * 2 * PAGE * 16 * 4 * 2  # two pages a row
    assert resident < {"windows": 0.3, "int8": 0.75, "int4": 0.6}[plan] * before  # of 16 dims: scales weigh much


def test_in_turn_from_full_pages_to_int8_to_int4_to_windows(monkeypatch):
    watch(monkeypatch)
    model = make_model("llama")
    whole = HeadPlan.uniform(model.config, HeadSpec())
    cache = RedKnotCache(model.config, whole, page_size=PAGE, hot=HOT)
    feed(model, cache, some_ids(2, 150))
    for plan in (whole.stored("int8"), whole.stored("int4"), HeadPlan.uniform(model.config, HeadSpec(40, 4))):
        cache.compress(plan)
        feed(model, cache, some_ids(2, 30))
        cache.crop(-5)
        feed(model, cache, some_ids(2, 1))


def test_what_would_grow_is_refused_before_anything_changes():
    model = make_model("llama")
    config = model.config
    plan = HeadPlan.with_global(config, [(0, 0), (1, 1)], HeadSpec(40, 4)).stored("int8")
    cache = RedKnotCache(config, plan, page_size=PAGE, hot=HOT)
    feed(model, cache, some_ids(1, 100))
    before = held(cache)
    for wider in (
        HeadPlan.uniform(config, HeadSpec()),
        plan.stored("model"),
        HeadPlan.with_global(config, [(0, 0), (1, 1)], HeadSpec(41, 4)).stored("int8"),
        HeadPlan.with_global(config, [(0, 0), (1, 1)], HeadSpec(40, 5)).stored("int8"),
    ):
        with pytest.raises(ValueError, match=r"layer \d, head \d keeps .* cannot become .*fork\(\)"):
            cache.compress(wider)
        with pytest.raises(ValueError, match="cannot become"):
            refuse_growth(plan, wider)
    refuse_growth(plan, plan)
    after = held(cache)
    assert all((before[row][0] == at).all() for row, (at, *_) in after.items())


@pytest.mark.parametrize("narrower", NARROWER)
def test_what_was_reserved_becomes_less_and_steps_go_on(narrower, monkeypatch):
    seen = watch(monkeypatch)
    model, ids = make_model("llama"), some_ids(2, 200)
    plan, whole = NARROWER[narrower](model.config), HeadPlan.uniform(model.config, HeadSpec())
    cache = RedKnotCache(model.config, whole, page_size=PAGE, hot=HOT, max_cache_len=200)
    feed(model, cache, ids[:, :120])
    fork, before = cache.fork(), cache.nbytes
    cache.compress(plan)
    made = RedKnotCache(model.config, plan, page_size=PAGE, hot=HOT, max_cache_len=200)
    feed(model, made, ids[:, :120])
    pools = [part for s in cache._storages() for part in (*s.pool.pages, *s.cold.pages)]
    assert cache.nbytes == made.nbytes == sum(part.untyped_storage().nbytes() for part in pools)
    assert cache.nbytes < 0.8 * before == 0.8 * fork.nbytes
    seen.clear()
    for part in ids[:, 120:].split([1, 30, 1, 48], 1):  # to the last slot
        feed(model, cache, part)
    assert len(seen) == 4 * len(cache.layers)
    with pytest.raises(ValueError, match="max_cache_len=200"):
        feed(model, cache, ids[:, :1])
    cache.reset()
    assert cache.nbytes == made.nbytes
    made.reset()
    torch.testing.assert_close(feed(model, cache, ids[:, :60]), feed(model, made, ids[:, :60]))


def test_an_empty_cache_takes_the_plan():
    model = make_model("llama")
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()), page_size=PAGE)
    plan = random_plan(model.config)
    cache.compress(plan)
    ids = some_ids(1, 60)
    assert torch.equal(feed(model, cache, ids), feed(model, RedKnotCache(model.config, plan, page_size=PAGE), ids))
