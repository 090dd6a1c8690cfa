"""A cache of `max_cache_len`: all is reserved at once, stays where it is, and serves to the last slot."""

import copy

import pytest
import torch
from layers import feed, planned
from oracle import masked_logits
from texts import some_ids


def test_max_cache_len_reserves_at_once_and_serves_to_the_last_slot():
    model, cache, ids = planned(2, 10, max_cache_len=60)
    reserved = cache.nbytes
    other = some_ids(2, 50, seed=3)
    logits = torch.cat([feed(model, cache, other[:, i : i + 10]) for i in range(0, 50, 10)], 1)
    assert cache.nbytes == reserved
    assert cache.get_max_length() == 60
    expected = masked_logits(model, cache.plan, torch.cat([ids, other], 1))[:, 10:]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_recording_after_prefill_widens_a_reserved_cache():
    model, cache, ids = planned(1, 120, max_cache_len=300)
    cache.activate_past_recording()
    other = some_ids(1, 40, seed=3)
    expected = masked_logits(model, cache.plan, torch.cat([ids, other], 1))[:, -40:]
    torch.testing.assert_close(feed(model, cache, other), expected, atol=2e-4, rtol=1e-4)


def test_a_reserved_cache_forks_and_repeats_with_memory_of_its_own():
    model, cache, ids = planned(2, 30, max_cache_len=60)
    reserved, fork = cache.nbytes, copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    assert (cache.nbytes, fork.nbytes) == (3 * reserved, reserved)
    other = some_ids(6, 9, seed=3)
    for held, before, after in ((cache, ids.repeat_interleave(3, 0), other), (fork, ids, other[:2])):
        expected = masked_logits(model, cache.plan, torch.cat([before, after], 1))[:, -9:]
        torch.testing.assert_close(feed(model, held, after), expected, atol=2e-4, rtol=1e-4)


def test_a_reserved_cache_takes_its_sequences_in_another_order():
    model, cache, ids = planned(3, 30, max_cache_len=60)
    reserved, pages = cache.nbytes, cache.layers[0].storage.pool.pages.keys.data_ptr()
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    other = some_ids(3, 9, seed=3)
    expected = masked_logits(model, cache.plan, torch.cat([ids[order], other], 1))[:, -9:]
    torch.testing.assert_close(feed(model, cache, other), expected, atol=2e-4, rtol=1e-4)
    assert (cache.nbytes, cache.layers[0].storage.pool.pages.keys.data_ptr()) == (reserved, pages)


def test_reset_keeps_what_was_reserved():
    model, cache, _ = planned(2, 50, max_cache_len=60)
    pages = cache.layers[0].storage.pool.pages.keys.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = some_ids(2, 60, seed=3)
    torch.testing.assert_close(feed(model, cache, ids), masked_logits(model, cache.plan, ids), atol=2e-4, rtol=1e-4)
    assert cache.layers[0].storage.pool.pages.keys.data_ptr() == pages


def test_a_refused_first_step_leaves_the_batch_open():
    model, cache, _ = planned(max_cache_len=30)
    with pytest.raises(ValueError, match="max_cache_len=30"):
        feed(model, cache, some_ids(2, 40))
    assert cache.nbytes == 0
    feed(model, cache, some_ids(1, 20))
    assert cache.batch_size == 1
