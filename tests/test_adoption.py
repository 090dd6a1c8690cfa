"""A filled DynamicCache taken over: heads hold what it held, and steps go on as under any plan."""

import gc
from copy import deepcopy
from weakref import ref

import numpy as np
import pytest
import torch
from families import make_model
from layers import feed, held
from oracle import random_plan
from texts import prompts, some_ids
from transformers import DynamicCache, StaticCache
from watched import HOT, PAGE, stored_plan, watch

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument
from redknot_hf.cache.adoption import adopt
from redknot_hf.cache.layer import RedKnotLayer

FAMILIES = ["llama", "gemma3", "gemma3n", "gemma4_ragged", "gpt_oss", "mistral_sliding", "mimo_v2_flash"]
OPTIONS = {"page_size": PAGE, "hot": HOT}


def filled(model, tokens=80, padding=(0, 9), config=None):
    """A DynamicCache that has read a prompt, and what it has read: ids and mask of ten tokens more, positions."""
    ids, mask = prompts(len(padding), tokens + 10, padding=padding)
    cache = DynamicCache(config=model.config if config is None else config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    read(model, cache, (ids, mask, positions), 0, tokens)
    return cache, (ids, mask, positions)


@torch.no_grad()
def read(model, cache, text, start, stop):
    ids, mask, positions = text
    step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
    return model(ids[:, start:stop], **cache_argument(model, cache), **step).logits


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_hold_what_the_cache_held_and_steps_see_it(family, monkeypatch):
    seen = watch(monkeypatch)
    model = make_model(family)
    plan = stored_plan(model.config)
    dynamic, text = filled(model)
    cache = RedKnotCache.from_cache(dynamic, plan, model.config, attention_mask=text[1][:, :80], **OPTIONS)
    assert cache.get_seq_length() == 80
    assert cache.plan == plan
    for (i, b, h), (at, *tensors) in held(cache).items():
        layer = [layer for layer in cache.layers if isinstance(layer, RedKnotLayer)][i]
        rules, length, k = layer.storage.rows.rules, 80 - 9 * b, np.arange(80 - 9 * b)
        seen_next = (k < rules.as_seen.sink[h]) | (k > length - rules.window[h])
        known = at[(k > length - rules.reach)[at]]  # the model's own window hides the rest
        assert np.isin(k[seen_next & (k > length - rules.reach)], known).all()
        cold = (known >= PAGE) & (known < (rules.cold_pages(length) + 1) * PAGE) if h in rules.stored_heads else False
        source = dynamic.layers[cache.layers.index(layer)]
        for x, y in zip(tensors, (source.keys, source.values), strict=True):
            wanted = y[b, h, known - length + y.shape[2]]
            ours, exact = x[np.isin(at, known)], torch.from_numpy(~np.broadcast_to(cold, known.shape))
            assert torch.equal(ours[exact], wanted[exact])
            assert (ours - wanted).norm() <= 0.2 * wanted.norm()
    seen.clear()
    for start, stop in [(80, 87), (87, 88), (88, 90)]:
        read(model, cache, text, start, stop)
    assert len(seen) == 3 * sum(isinstance(layer, RedKnotLayer) for layer in cache.layers)


def test_it_is_what_is_left_of_an_all_global_cache_that_obeys_the_plan():
    model = make_model("llama")
    dynamic, text = filled(model)
    whole, plan = HeadPlan.uniform(model.config, HeadSpec()), stored_plan(model.config)
    caches = [
        RedKnotCache.from_cache(dynamic, p, model.config, attention_mask=text[1][:, :80], **OPTIONS)
        for p in (whole, plan)
    ]
    caches[0].compress(plan)
    first, second = map(held, caches)
    for row, (at, *tensors) in first.items():
        mine = np.isin(second[row][0], at)  # the slack of rings may hold more
        assert mine.sum() == len(at)
        for x, y in zip(tensors, second[row][1:], strict=True):
            assert torch.equal(x, y[mine])


@pytest.mark.parametrize("reserved", [None, 128])
def test_what_is_read_afterwards_is_what_any_cache_reads(reserved):
    """Under an all-global plan, token for token; it may be cut back, forked and offloaded."""
    model, ids = make_model("llama"), some_ids(2, 50)
    dynamic = DynamicCache(config=model.config)
    feed(model, dynamic, ids[:, :40])
    whole = HeadPlan.uniform(model.config, HeadSpec())
    cache = RedKnotCache.from_cache(dynamic, whole, model, max_cache_len=reserved, page_size=PAGE)
    fork = cache.fork()
    fork.offload()
    for one in (cache, fork):
        wanted = deepcopy(dynamic)
        for part in ids[:, 40:].split([1, 9], 1):
            torch.testing.assert_close(feed(model, one, part), feed(model, wanted, part))
    cache.crop(-9)
    wanted.crop(-9)
    torch.testing.assert_close(feed(model, cache, ids[:, 41:]), feed(model, wanted, ids[:, 41:]))


def test_bytes_of_what_is_dropped_are_given_back():
    model = make_model("llama")
    plan = HeadPlan.with_global(model.config, [(0, 0)], HeadSpec(16, 2)).stored("int8")
    dynamic = DynamicCache(config=model.config)
    feed(model, dynamic, some_ids(2, 700))
    held = [ref(x) for layer in dynamic.layers for x in (layer.keys, layer.values)]
    dense = sum(x().untyped_storage().nbytes() for x in held)
    cache = RedKnotCache.from_cache(dynamic, plan, model.config, **OPTIONS)
    del dynamic
    gc.collect()
    assert not any(x() is not None for x in held)  # the pages hold nothing of them
    assert cache.dense_nbytes == dense
    pools = [part for s in cache._storages() for part in (*s.pool.pages, *s.cold.pages)]
    resident = sum(part.untyped_storage().nbytes() for part in pools)
    assert resident == cache.nbytes < 0.2 * dense
    made = RedKnotCache(model.config, plan, **OPTIONS)
    for part in some_ids(2, 700).split(100, 1):
        feed(model, made, part)
    assert abs(resident - made.nbytes) <= len(cache.layers) * 2 * 4 * 2 * PAGE * 16 * 4 * 2  # two pages a row


def test_the_dtype_is_that_of_what_it_holds():
    model = make_model("llama", dtype=torch.bfloat16)
    dynamic, text = filled(model, padding=(0,))
    cache = RedKnotCache.from_cache(dynamic, random_plan(model.config), model.config, page_size=PAGE)
    assert {storage.pool.pages.keys.dtype for storage in cache._storages()} == {torch.bfloat16}
    assert read(model, cache, text, 80, 90).dtype == torch.bfloat16


def test_padding_anywhere_and_a_sequence_of_nothing(monkeypatch):
    watch(monkeypatch)
    model = make_model("gemma3")
    ids, _ = prompts(3, 70)
    mask = (torch.rand(3, 70, generator=torch.Generator().manual_seed(3)) < torch.tensor([[1], [0.7], [0]])).long()
    mask[:, 45:] = 1  # so that sliding layers hold a window of tokens
    mask[2, :60] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    dynamic = DynamicCache(config=model.config)
    read(model, dynamic, (ids, mask, positions), 0, 58)
    plan = random_plan(model.config)
    cache = RedKnotCache.from_cache(dynamic, plan, model.config, attention_mask=mask[:, :58], page_size=PAGE)
    assert cache._storages()[0].rows.lengths.tolist() == mask[:, :58].sum(1).tolist()
    read(model, cache, (ids, mask, positions), 58, 59)
    read(model, cache, (ids, mask, positions), 59, 70)


@pytest.mark.parametrize("padding", [-torch.inf, -1e9, torch.nan], ids=str)
def test_masks_that_are_added_or_hold_no_numbers_are_refused(padding):
    model = make_model("llama")
    dynamic, (_, mask, _) = filled(model, padding=(3, 0))
    added = torch.zeros(2, 80).masked_fill(mask[:, :80] == 0, padding)
    plan = HeadPlan.uniform(model.config, HeadSpec())
    with pytest.raises(ValueError, match=r"attention_mask holds (-|nan).*1 where a token is"):
        RedKnotCache.from_cache(dynamic, plan, model.config, attention_mask=added)


def test_a_cut_back_into_what_sliding_layers_have_lost_is_told():
    model = make_model("gemma3")
    dynamic, text = filled(model, padding=(0,))
    plan = HeadPlan.uniform(model.config, HeadSpec(5, 3))
    cache = RedKnotCache.from_cache(dynamic, plan, model.config, page_size=PAGE)
    with pytest.raises(ValueError, match="beyond what local heads keep"):
        cache.crop(-1)
    read(model, cache, text, 80, 90)
    cache.crop(-10)


def test_what_does_not_suffice_is_refused():
    model = make_model("gemma3")
    config, whole = model.config, HeadPlan.uniform(model.config, HeadSpec())
    narrow = deepcopy(config)
    narrow.sliding_window = 6
    with pytest.raises(ValueError, match=r"layer 0: of each head \(window, sink\) there is \[\(5, 0\).*no more"):
        RedKnotCache.from_cache(filled(model, config=narrow)[0], whole, config)
    with pytest.raises(ValueError, match=r"layer 0: .* needs \[\(6, 1\)"):  # the sink is in sight of the next token
        RedKnotCache.from_cache(
            filled(model, config=narrow)[0], HeadPlan.uniform(config, HeadSpec(6, 1)), config, page_size=PAGE
        )
    RedKnotCache.from_cache(filled(model, config=narrow)[0], HeadPlan.uniform(config, HeadSpec(6)), config)
    padded = filled(model, padding=(0, 0))
    padded[1][1][1, 60:78] = 0  # of one sequence the sliding layers hold little but padding
    with pytest.raises(ValueError, match="layer 0"):
        RedKnotCache.from_cache(padded[0], whole, config, attention_mask=padded[1][1][:, :80])
    with pytest.raises(ValueError, match="holds 80 slots and exceeds max_cache_len=79"):
        RedKnotCache.from_cache(filled(model)[0], whole, config, max_cache_len=79)
    with pytest.raises(ValueError, match=r"\(2, 79\): give one of \(2, 80\)"):
        RedKnotCache.from_cache(filled(model)[0], whole, config, attention_mask=torch.ones(2, 79))
    other = make_model("llama", num_hidden_layers=2)
    with pytest.raises(ValueError, match="2 layers, and this config's model keeps keys in 4"):
        RedKnotCache.from_cache(filled(other)[0], whole, config)
    broken = filled(model)[0]
    broken.layers[2].reset()
    with pytest.raises(ValueError, match=r"hold \[0, 80\] slots"):
        RedKnotCache.from_cache(broken, whole, config)
    with pytest.raises(TypeError, match="got a StaticCache with StaticSlidingWindowLayer"):
        RedKnotCache.from_cache(StaticCache(config, max_cache_len=90), whole, config)
    with pytest.raises(TypeError, match="got a RedKnotCache with RedKnotLayer"):
        adopt(RedKnotCache(config, whole).layers, RedKnotCache(config, whole), None)


def test_an_empty_cache_and_one_made_without_a_config():
    model = make_model("gemma3")
    plan = random_plan(model.config)
    empty = RedKnotCache.from_cache(DynamicCache(config=model.config), plan, model.config, page_size=PAGE)
    ids = some_ids(1, 60)
    mine = RedKnotCache(model.config, plan, page_size=PAGE)
    assert torch.equal(feed(model, empty, ids), feed(model, mine, ids))
    plain = DynamicCache()  # its sliding layers lose nothing
    feed(model, plain, ids)
    cache = RedKnotCache.from_cache(plain, plan, model.config, page_size=PAGE)
    cache.crop(-3)
    assert cache.get_seq_length() == 57
