"""Pages and their holders."""

import gc

import numpy as np
import pytest
import torch
from redknot_kernels import UNBOUNDED, HeadRules

from redknot_hf.cache.pool import PagePool
from redknot_hf.cache.rows import Rows


def make_pool(pages=None):
    pool = PagePool(8, (4, 6), torch.float32, torch.device("cpu"), pages)
    rows = Rows(2, HeadRules.make((UNBOUNDED, 5), (0, 1), page_size=8))
    pool.hold(rows)
    return pool, rows


def grow(pool, rows, lengths, spare=0):
    rows.reserve(np.array(lengths), lambda count: pool.allocate(count, spare))
    rows.advance(np.array(lengths) - rows.lengths)


def mark(pool):
    """Writes every page's own number into it."""
    pool.pages.keys[:] = torch.arange(pool.size)[:, None, None]
    pool.pages.values[:] = -pool.pages.keys[:, :, :1]


def test_the_pool_grows_by_what_is_missing_and_a_spare():
    pool, rows = make_pool()
    grow(pool, rows, [20, 5])
    assert pool.size == 3 + 2 + 1 + 1
    assert pool.nbytes == 7 * 8 * (4 + 6) * 4
    grow(pool, rows, [25, 5], spare=2)
    assert pool.size == 7 + 1 + 2
    grow(pool, rows, [40, 5], spare=2)
    assert pool.size == 10, "the spare pages served"


def test_growing_keeps_what_is_written_and_adds_finite_pages():
    pool, rows = make_pool()
    grow(pool, rows, [20, 5])
    mark(pool)
    grow(pool, rows, [40, 5])
    assert torch.equal(pool.pages.keys[:7, 0, 0], torch.arange(7.0))
    assert pool.pages.keys.isfinite().all()
    assert pool.pages.values.isfinite().all()


def test_trim_gives_free_pages_back_and_renumbers_every_holder():
    pool, rows = make_pool()
    grow(pool, rows, [40, 40])
    fork = rows.fork()
    pool.hold(fork)
    mark(pool)
    before = pool.pages.keys[fork.table[0, 0, :1], 0, 0]
    rows.cut(np.array([0, 0]))
    fork.select(np.array([0]))
    pool.trim(spare=0)
    assert pool.size == 5 + 2
    assert torch.equal(pool.pages.keys[fork.table[0, 0, :1], 0, 0], before)
    assert (pool.pages.values[:, 0, 0] == -pool.pages.keys[:, 0, 0]).all()


def test_pages_of_a_dead_holder_are_free():
    pool, rows = make_pool()
    grow(pool, rows, [40, 40])
    assert (pool.refs() == 1).all()
    del rows
    gc.collect()
    assert (pool.refs() == 0).all()
    assert len(pool.allocate(4)) == 4
    assert pool.size == 14


def test_a_fixed_pool_says_that_it_is_full():
    pool, rows = make_pool(pages=8)
    grow(pool, rows, [20, 5])
    with pytest.raises(RuntimeError, match=r"2 pages of 8 tokens are needed and 1 of 8 are free.*max_cache_len"):
        grow(pool, rows, [33, 5])
    pool.shrink()
    assert pool.size == 8
    pool.trim(0)  # other rules need fewer
    assert pool.size == 7
    assert (pool.refs() == 1).all()


def test_sharing_is_noticed_and_forgotten():
    pool, rows = make_pool()
    grow(pool, rows, [20, 5])
    assert not pool.shared
    fork = rows.fork()
    pool.hold(fork)
    assert pool.shared
    fork.cut(np.array([0, 0]))
    pool.refs()
    assert not pool.shared


def test_laying_out_keeps_what_is_written_and_adds_empty_pages():
    pool, rows = make_pool()
    grow(pool, rows, [20, 20])
    grow(pool, rows, [40, 40])
    mark(pool)
    before = pool.pages.keys[rows.table[:, 0]].clone()
    assert pool.alone(rows)
    pool.lay_out(rows, np.array([48, 48]))
    assert torch.equal(pool.pages.keys[rows.table[:, 0, :5]], before)
    assert (pool.pages.values[:, 0, 0] == -pool.pages.keys[:, 0, 0]).all()
    assert pool.size == 2 * (6 + 1 + 2)
    assert pool.free == 2
    assert pool.pages.keys[rows.table[:, 0, 5]].eq(0).all()


def test_rows_with_company_are_not_laid_out_anew():
    pool, rows = make_pool()
    grow(pool, rows, [20, 5])
    fork = rows.fork()
    pool.hold(fork)
    assert not pool.alone(rows)
    del fork
    gc.collect()
    assert pool.alone(rows)
    rows.select(np.array([0, 0]))
    assert not pool.alone(rows), "its pages stand twice in its own table"
