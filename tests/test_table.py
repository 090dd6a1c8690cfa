"""Reference counts and the free list say what counting all tables says."""

import pickle

import numpy as np
import pytest
import torch
from redknot_kernels import UNBOUNDED, HeadRules

from redknot_hf.cache.pool import PagePool
from redknot_hf.cache.rows import Rows
from redknot_hf.cache.table import ABSENT, PageTable, References


def test_pages_are_free_when_nobody_lists_them():
    references = References(6)
    first, second = references.take(2), references.take(3)
    assert (first.tolist(), second.tolist(), references.free) == ([0, 1], [2, 3, 4], 1)
    references.share(first)
    assert references.shared
    references.release(np.array([0, 1, 2]))
    assert references.counts.tolist() == [1, 1, 0, 1, 1, 0]
    assert not references.shared
    references.release(np.array([0, 1]))
    assert references.take(3).tolist() == [0, 1, 2], "pages that came back together are handed out in their order"


def test_growing_adds_free_pages_behind_those_that_are_listed():
    references = References(2)
    references.take(2)
    references.resize(5)
    assert references.counts.tolist() == [1, 1, 0, 0, 0]
    assert references.take(2).tolist() == [2, 3]


def test_a_table_counts_where_a_pool_holds_it():
    table = PageTable(np.array([[[0, 1, ABSENT]]]))
    table.release(table.listed)  # nobody counts yet
    table.references = References(2)
    table.share(table.listed)
    assert table.references.free == 0
    assert pickle.loads(pickle.dumps(table)).references is None


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_all_tables_whatever_happens(seed):
    generator = np.random.default_rng(seed)
    pool = PagePool(8, (2, 2), torch.float32, torch.device("cpu"))
    held = [Rows(2, HeadRules.make((UNBOUNDED, 20, 1), (0, 3, 0), page_size=8))]
    pool.hold(held[0])
    for _ in range(150):
        rows = held[generator.integers(len(held))]
        action = generator.integers(8)
        if action == 0 and len(held) < 5:
            held.append(rows.fork())
            pool.hold(held[-1])
        elif action == 1 and len(held) > 1:
            held.remove(rows)
        elif action == 2:
            rows.select(generator.integers(rows.batch, size=generator.integers(1, 4)))
        elif action == 3 and not rows.missing_after(lengths := np.maximum(rows.lengths - generator.integers(8), 0)):
            rows.cut(lengths)
        elif action == 4:
            pool.shrink()
        else:
            lengths = rows.lengths + generator.integers(0, 12, size=rows.batch)
            if not rows.has_room(lengths):
                pool.copy(*rows.unshare(lengths, pool.references.counts, pool.allocate))
                rows.reserve(lengths, pool.allocate)
            grown = rows.lengths < lengths
            last = (np.maximum(lengths, 1) - 1) // 8
            written = rows.table[grown, 0, last[grown]]
            assert (written != ABSENT).all()
            assert (pool.refs()[written] == 1).all(), "what is written nobody else lists"
            rows.advance(lengths - rows.lengths)
        del rows
        np.testing.assert_array_equal(pool.references.counts, pool.refs())
        assert pool.free == (pool.refs() == 0).sum()
        assert pool.shared == (pool.refs() > 1).any()
