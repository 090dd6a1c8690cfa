"""When a layer's rows can be read as plain tensors, and when they are looked at anew."""

import pickle

import numpy as np
import torch
from redknot_kernels import UNBOUNDED, HeadRules

from redknot_hf.cache.pool import PagePool
from redknot_hf.cache.row_views import RowViews
from redknot_hf.cache.rows import Rows


def make_rows(lengths):
    pool = PagePool(8, (4, 6), torch.float32, torch.device("cpu"))
    rows = Rows(2, HeadRules.make((UNBOUNDED, 5, UNBOUNDED), (0, 1, 0), page_size=8))
    pool.hold(rows)
    pool.lay_out(rows, np.array(lengths))
    pool.pages.keys[:] = torch.arange(pool.size)[:, None, None]
    return pool, rows


def test_views_show_the_pages_of_every_row():
    pool, rows = make_rows([20, 20])
    whole, near = RowViews().refresh(rows, pool) or ()
    assert (whole.heads, near.heads) == ((0, 2), (1,))
    for view in (whole, near):
        (piece,) = view.pieces
        table = rows.table[:, list(view.heads), : piece.keys.shape[2] // 8]
        assert torch.equal(piece.keys[..., 0], torch.from_numpy(table).float().repeat_interleave(8, 2))
        assert piece.values.shape == (*piece.keys.shape[:3], 6)
        assert piece.keys.untyped_storage().data_ptr() == pool.pages.keys.untyped_storage().data_ptr()


def test_views_are_kept_until_a_table_or_the_pages_change():
    pool, rows = make_rows([20, 20])
    views = RowViews()
    first = views.refresh(rows, pool)
    assert views.refresh(rows, pool) is first
    pool.grow(pool.size + 1)
    second = views.refresh(rows, pool)
    assert second is not first
    pool.lay_out(rows, np.array([30, 30]))
    third = views.refresh(rows, pool)
    assert third is not second
    assert third[0].pieces[0].keys.shape[2] == 32
    assert pickle.loads(pickle.dumps(views)).refresh(rows, pool) is not third


def test_rows_with_other_numbers_of_pages_have_no_views():
    pool, rows = make_rows([20, 5])
    assert RowViews().refresh(rows, pool) is None
