"""Stored tokens put into rows, and read out again."""

import copy

import numpy as np
import pytest
import torch
from families import make_model
from redknot_kernels import UNBOUNDED

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache
from redknot_hf.cache.packing import splice
from redknot_hf.cache.span import KeptLayer
from redknot_hf.reuse.segment import empty

HEADS = (HeadSpec(), HeadSpec(3, 2), HeadSpec(40, 0), HeadSpec(1, 5))
WINDOW, SINK = (UNBOUNDED, 3, 40, 1), (0, 2, 0, 5)


@pytest.fixture
def layer():
    model = make_model("llama", num_hidden_layers=1)
    (layer,) = RedKnotCache(model.config, HeadPlan([HEADS]), page_size=16).layers
    layer.lazy_initialization(torch.zeros(2, 4, 0, 2), torch.zeros(2, 4, 0, 3))
    return layer


def numbered(tokens: int, first: int, window=WINDOW, sink=SINK):
    """Every key and value says which head and which token it is."""
    segment = empty("a", tuple(range(tokens)), (), (KeptLayer(window, sink, 2, 3),), torch.zeros(0))
    heads, places = (torch.from_numpy(x) for x in segment.layers[0].packed(tokens))
    segment.keys(0).copy_((1000 * heads + first + places)[:, None].expand(-1, 2))
    segment.values(0).copy_(-segment.keys(0)[:, :1].expand(-1, 3))
    return segment


def check(layer, sequence):
    """Rows hold the tokens they say they hold, and all that the next query sees."""
    rows = layer.storage.rows
    length = rows.lengths[sequence]
    for head, spec in enumerate(HEADS):
        held = rows.positions_held(sequence, head)
        wanted = set(range(length)) if spec.is_global else set(range(min(spec.sink, length)))
        assert wanted | set(range(max(0, length - (spec.window or 0) + 1), length)) <= set(held.tolist())
        keys, values = layer.storage.read(sequence, np.full(len(held), head), held)
        np.testing.assert_array_equal(keys[:, 0].numpy(), 1000 * head + held)
        np.testing.assert_array_equal(values[:, 2].numpy(), -1000 * head - held)


@pytest.mark.parametrize("lengths", [[1] * 7, [5, 1, 60, 2], [200, 30], [3, 3, 100, 1, 1, 50], [64, 64], [1, 300, 39]])
def test_rows_hold_the_tokens_of_all_segments(layer, lengths):
    start = 0
    for tokens in lengths:
        splice(layer.storage, 0, 1, numbered(tokens, start))
        start += tokens
        check(layer, 1)
    layer.storage.left_align()
    assert layer.get_seq_length() == start
    assert layer.storage.history.real_among_last(start, 2).tolist() == [0, start]


def test_what_is_full_may_be_spliced_and_what_lacks_may_not(layer):
    splice(layer.storage, 0, 0, numbered(80, 0, (UNBOUNDED,) * 4, (0,) * 4))
    check(layer, 0)
    for window, sink in [((UNBOUNDED, 2, 40, 1), SINK), (WINDOW, (0, 1, 0, 5)), (WINDOW[:2], SINK[:2])]:
        with pytest.raises(ValueError, match="add the text to a store of this plan"):
            splice(layer.storage, 0, 0, numbered(80, 80, window, sink))


def test_forks_keep_their_pages(layer):
    splice(layer.storage, 0, 0, numbered(50, 0))
    layer.storage.left_align()
    fork = copy.deepcopy(layer)
    assert fork.storage.pool is layer.storage.pool
    splice(fork.storage, 0, 0, numbered(70, 50))
    check(fork, 0)
    check(layer, 0)
    assert layer.storage.rows.lengths[0] == 50


def test_a_crop_reaches_as_far_as_was_stored(layer):
    splice(layer.storage, 0, 0, numbered(200, 0))
    splice(layer.storage, 0, 1, numbered(200, 0))
    layer.storage.left_align()
    with pytest.raises(ValueError, match="local heads keep"):
        layer.crop(-3)
    layer.crop(-1)  # windows hold one token more than a query behind them sees
    check(layer, 0)
