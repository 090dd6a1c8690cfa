"""Giving local rows longer rings."""

import numpy as np
import pytest
import torch
from redknot_kernels import UNBOUNDED, HeadRules, gather_tokens, scatter_tokens

from redknot_hf.cache.pool import PagePool
from redknot_hf.cache.rows import Rows
from redknot_hf.cache.widening import widen

WINDOWS, SINKS = (UNBOUNDED, 5, 9), (0, 2, 0)


@pytest.mark.parametrize("length", [6, 20, 40, 100])
def test_every_row_holds_afterwards_what_it_held(length):
    narrow, wide = (HeadRules.make(WINDOWS, SINKS, page_size=8, slack=slack) for slack in (0, 64))
    pool, rows = PagePool(8, (1, 1), torch.float32, torch.device("cpu")), Rows(1, narrow)
    pool.hold(rows)

    def reserve():
        rows.reserve(rows.lengths, pool.allocate)

    rows.reserve(np.array([length]), pool.allocate)
    rows.advance(np.array([length]))
    held = [rows.positions_held(0, h) for h in range(3)]

    def row(h):
        return torch.from_numpy(np.maximum(rows.table[:, h : h + 1], 0))

    for h, positions in enumerate(held):
        where = torch.from_numpy(positions)[None, None]
        new = where[..., None].float()
        scatter_tokens(pool.pages, row(h), narrow.take((h,)).slots(where), new, -new)
    widen(rows, pool, wide, reserve)
    for h, positions in enumerate(held):
        where = torch.from_numpy(positions)[None, None]
        keys, values = gather_tokens(pool.pages, row(h), wide.take((h,)).slots(where))
        assert keys.flatten().tolist() == positions.tolist()
        assert torch.equal(values, -keys)
        assert rows.positions_held(0, h).tolist() == positions.tolist()
