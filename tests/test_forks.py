"""Forks used from different threads, and the pages they give back and take along."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from families import make_model
from layers import feed, planned
from oracle import masked_logits, random_plan
from texts import some_ids

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, SegmentStore, assemble, cache_argument
from redknot_hf.cache.pool import PagePool

PAGE = 16


def answers(model, caches, asks, threads):
    """What every cache goes on by, from greedy search: at the same time, or one after the other."""
    together = Barrier(len(caches) if threads else 1)

    def ask(cache, ids):
        together.wait()
        return model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False).tolist()

    with ThreadPoolExecutor(len(caches) if threads else 1) as pool:
        return list(pool.map(ask, caches, asks))


def questions(prefix, count, batch=1):
    return [torch.cat([prefix.expand(batch, -1), torch.full((batch, 5), 50 + k)], 1) for k in range(count)]


def forks_of(how, model, plan, prefix):
    """Caches that share pages, made as `how` says, and what each is asked."""
    base = RedKnotCache(model.config, plan, page_size=PAGE)
    feed(model, base, prefix)
    asks = questions(prefix, 4)
    if how == "forks":
        return [copy.deepcopy(base) for _ in asks], asks
    if how == "source and forks":
        return [base, *(copy.deepcopy(base) for _ in asks[1:])], asks
    if how == "forks of forks":
        found = [base]
        for _ in asks[1:]:
            found.append(copy.deepcopy(found[-1]))
        return found, asks
    if how == "selected":
        base.batch_repeat_interleave(4)
        found = [copy.deepcopy(base) for _ in asks]
        for k, cache in enumerate(found):
            cache.batch_select_indices(torch.tensor([k]))
        return found, asks
    base.batch_repeat_interleave(2)
    return [copy.deepcopy(base) for _ in asks[:3]], questions(prefix, 3, batch=2)


@pytest.mark.parametrize("how", ["forks", "source and forks", "forks of forks", "selected", "repeated"])
@pytest.mark.parametrize("everything", [True, False], ids=["global", "planned"])
def test_forks_in_threads_give_what_each_gives_alone(how, everything):
    model = make_model("llama")
    plan = HeadPlan.uniform(model.config, HeadSpec()) if everything else random_plan(model.config)
    prefix = some_ids(1, 38)
    expected = answers(model, *forks_of(how, model, plan, prefix), threads=False)
    for _ in range(2):
        assert answers(model, *forks_of(how, model, plan, prefix), threads=True) == expected


def test_forks_of_an_assembled_cache_answer_in_threads():
    model = make_model("llama")
    plan = random_plan(model.config)
    store = SegmentStore(model, plan)
    refs = [store.add(some_ids(1, length, seed=length)[0].tolist()) for length in (30, 41)]
    base = assemble(model, refs, page_size=PAGE)
    prefix = torch.tensor([[i for ref in refs for i in ref.ids]])
    asks = questions(prefix, 3)
    expected = answers(model, [copy.deepcopy(base) for _ in asks], asks, threads=False)
    assert answers(model, [base, *(copy.deepcopy(base) for _ in asks[1:])], asks, threads=True) == expected


def test_forks_may_be_made_and_dropped_in_threads():
    model, base, prefix = planned(1, 60)
    expected = [masked_logits(model, base.plan, ask)[:, -5:] for ask in questions(prefix, 3)]

    def ask(k):
        for _ in range(4):
            fork = copy.deepcopy(base)
            logits = feed(model, fork, questions(prefix, 3)[k][:, 60:])
            torch.testing.assert_close(logits, expected[k], atol=2e-4, rtol=1e-4)
            del fork

    held = base.nbytes
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, range(3)))
    gc.collect()
    assert base.nbytes == held
    for layer in base.layers:
        assert (layer.storage.pool.references.counts == layer.storage.pool.refs()).all()


@pytest.mark.parametrize("how", ["delete", "reset"])
def test_pages_of_a_fork_that_is_gone_come_back_at_once(how):
    model, cache, _ = planned(1, 100)
    alone = cache.nbytes
    fork = copy.deepcopy(cache)
    feed(model, fork, some_ids(1, 200))
    assert cache.nbytes > 1.5 * alone
    if how == "delete":
        del fork
    else:
        fork.reset()
    held = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in layer.storage.pool.pages)
    assert held == cache.nbytes == alone


def test_a_pickled_fork_carries_its_own_pages_only():
    model, base, ids = planned(1, 32)
    fork = copy.deepcopy(base)
    feed(model, base, some_ids(1, 320))
    _, alone, _ = planned(1, 32)
    pickled = pickle.dumps(fork)
    assert len(pickled) < len(pickle.dumps(alone)) + 256
    taken = pickle.loads(pickled)
    other = some_ids(1, 20, seed=3)
    expected = masked_logits(model, base.plan, torch.cat([ids, other], 1))[:, -20:]
    for cache in (taken, fork):
        torch.testing.assert_close(feed(model, cache, other), expected, atol=2e-4, rtol=1e-4)
    feed(model, alone, other)
    assert taken.nbytes <= alone.nbytes


def test_reset_leaves_nothing_in_the_pages_that_stay_reserved():
    _, cache, _ = planned(1, 50, max_cache_len=60)
    cache.reset()
    for held in (cache, pickle.loads(pickle.dumps(cache))):
        assert not any(x.count_nonzero() for layer in held.layers for x in layer.storage.pool.pages)


def test_first_steps_of_many_forks_copy_few_pages(monkeypatch):
    copied, rebuild = [], PagePool._rebuild
    monkeypatch.setattr(PagePool, "_rebuild", lambda pool, ids: (copied.append((ids >= 0).sum()), rebuild(pool, ids)))
    model = make_model("llama", num_hidden_layers=1)
    base = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()), page_size=PAGE)
    feed(model, base, some_ids(1, 256))
    copied_for, new_for = {}, {}
    for count in (10, 40):
        forks = [copy.deepcopy(base) for _ in range(count)]
        before = sum(layer.storage.pool.size for layer in base.layers)
        copied.clear()
        for fork in forks:
            feed(model, fork, some_ids(1, 1))
        copied_for[count] = sum(copied)
        new_for[count] = sum(layer.storage.pool.size for layer in base.layers) - before
        del forks, fork
        gc.collect()
    assert copied_for[40] / new_for[40] < 2 * copied_for[10] / new_for[10]


def test_a_mask_of_ones_own_is_taken_again_once_the_padded_sequences_are_gone():
    model, cache, _ = planned()
    ids, flags = some_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    flags[1, :6] = 0
    with torch.no_grad():
        model(ids, attention_mask=flags, **cache_argument(model, cache))
        cache.batch_select_indices(torch.tensor([0]))
        mask = torch.ones(1, 1, 4, 24, dtype=torch.bool).tril(20)
        logits = model(some_ids(1, 4, seed=2), attention_mask=mask, **cache_argument(model, cache)).logits
    whole = torch.cat([ids[:1], some_ids(1, 4, seed=2)], 1)
    torch.testing.assert_close(logits, masked_logits(model, cache.plan, whole)[:, -4:], atol=2e-4, rtol=1e-4)
