"""One layer: what it reserves, what is read of it in place, and how far it can be taken back."""

import copy

import numpy as np
import pytest
import torch
from layers import PAGE, feed, planned
from oracle import masked_logits
from texts import some_ids

from redknot_hf import cache_argument


def mirrored(storage):
    """What kernels read, up to date."""
    storage.mirror.refresh_table(storage.rows, storage.pool.pages.device)
    return storage.mirror


def in_place(layer):
    """Whether the layer's rows can be read as plain tensors."""
    storage = layer.storage
    return storage.mirror.views(storage.rows, storage.pool)


@pytest.mark.parametrize("reserved", [None, 200])
def test_decoding_reads_rows_in_place_however_they_grow_and_are_cut(reserved):
    model, cache, ids = planned(batch=2, length=20, max_cache_len=reserved)
    for i in range(100):
        token = some_ids(2, 1, seed=i)
        feed(model, cache, token)
        ids = torch.cat([ids, token], 1)
        assert all(map(in_place, cache.layers)), f"step {i}"
    cache.crop(-PAGE // 2)
    ids = ids[:, : -PAGE // 2]
    assert all(map(in_place, cache.layers))
    token = some_ids(2, 1)
    expected = masked_logits(model, cache.plan, torch.cat([ids, token], 1))[:, -1:]
    torch.testing.assert_close(feed(model, cache, token), expected, atol=1e-4, rtol=1e-4)


def test_forks_are_read_in_place_too():
    model, cache, ids = planned(batch=2, length=3 * PAGE + 5)
    fork = copy.deepcopy(cache)
    for i in range(2 * PAGE):
        token = some_ids(2, 1, seed=i)
        ids = torch.cat([ids, token], 1)
        logits = feed(model, fork, token)
        assert all(map(in_place, fork.layers)), f"step {i}"
    torch.testing.assert_close(logits, masked_logits(model, cache.plan, ids)[:, -1:], atol=1e-4, rtol=1e-4)


def test_rows_of_different_length_are_not_read_in_place():
    model, cache, _ = planned(batch=2, length=20)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, -1] = 0
    with torch.no_grad():
        model(some_ids(2, 1), attention_mask=mask, **cache_argument(model, cache))
    assert not any(map(in_place, cache.layers))


def test_a_layer_holds_nothing_before_the_first_step():
    _, cache, _ = planned()
    layer = cache.layers[0]
    assert (layer.nbytes, layer.get_seq_length(), layer.is_initialized) == (0, 0, False)
    with pytest.raises(RuntimeError, match="takes its shape from the first forward pass"):
        layer.storage  # noqa: B018 - it raises


def test_reserving_gives_every_row_room_and_leaves_what_is_stored():
    model, cache, ids = planned(batch=2, length=20)
    for layer in cache.layers:
        storage = layer.storage
        rows = storage.rows
        storage.reserve(np.array([100, 70]))
        assert rows.has_room(np.array([100, 70]))
        before = rows.version
        storage.reserve(np.array([90, 20]))
        assert rows.version == before
        np.testing.assert_array_equal(mirrored(storage).table.numpy(), np.maximum(rows.table, 0))
    token = some_ids(2, 1)
    expected = masked_logits(model, cache.plan, torch.cat([ids, token], 1))[:, -1:]
    torch.testing.assert_close(feed(model, cache, token), expected, atol=1e-4, rtol=1e-4)


def test_a_crop_is_counted_in_real_tokens():
    model, cache, _ = planned(batch=2, length=20)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 21:23] = 0
    with torch.no_grad():
        model(some_ids(2, 4), attention_mask=mask, **cache_argument(model, cache))
    layer = cache.layers[0]
    assert layer.get_seq_length() == 24
    assert layer.storage.rows.lengths.tolist() == [22, 24]
    fork = copy.deepcopy(layer)
    fork.crop(-3)
    assert fork.storage.rows.lengths.tolist() == [21, 21]
    fork.crop(0)
    assert fork.storage.rows.lengths.tolist() == [21, 21]
    with pytest.raises(ValueError, match="more than the 24 slots"):
        layer.check_crop(-25)
    with pytest.raises(ValueError, match="negative number"):
        layer.check_crop(1)


def test_masks_describe_every_slot():
    _, cache, _ = planned(batch=1, length=20)
    assert cache.layers[0].get_mask_sizes(3) == (23, 0)
    assert not cache.layers[0].captures(1)
