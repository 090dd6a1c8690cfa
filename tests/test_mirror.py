"""What kernels read of the rows follows the host, in the same tensors where it can; when rows are plain tensors."""

import pickle

import numpy as np
import torch
from layers import grow, make_rows
from redknot_kernels import UNBOUNDED, HeadRules

from redknot_hf.cache.mirror import Mirror, Stretch, stretches
from redknot_hf.cache.pool import PagePool, staged
from redknot_hf.cache.rows import ABSENT, Rows

CPU = torch.device("cpu")


def test_tables_and_counts_follow_the_rows():
    rows, shelf = make_rows()
    on_device = Mirror()
    for lengths in ([5, 0], [9, 30], [9, 31]):
        grow(rows, shelf, lengths)
        on_device.refresh(rows, max(lengths), CPU)
        np.testing.assert_array_equal(on_device.table.numpy(), np.maximum(rows.table, 0))
        assert on_device.counts.tolist() == [*lengths, max(lengths)]
    assert on_device.bounds.tolist() == rows.rules.tensors(CPU).tolist()
    assert on_device.most_kept == rows.rules.most_kept(rows.table.shape[2])


def test_tensors_stay_where_they_are_as_long_as_their_shapes_do():
    rows, shelf = make_rows()
    on_device = Mirror()
    grow(rows, shelf, [30, 30])
    on_device.refresh(rows, 30, CPU)
    table, counts = on_device.table, on_device.counts
    rows.select(np.array([1, 0]))
    rows.advance(np.array([1, 2]))
    on_device.refresh(rows, 32, CPU)
    assert on_device.table is table
    assert on_device.counts is counts
    assert counts.tolist() == [31, 32, 32]
    np.testing.assert_array_equal(table.numpy(), np.maximum(rows.table, 0))


def test_the_table_can_come_alone():
    rows, shelf = make_rows()
    on_device = Mirror()
    grow(rows, shelf, [3, 3])
    on_device.refresh(rows, 3, CPU)
    grow(rows, shelf, [20, 20])
    on_device.refresh_table(rows, CPU)
    np.testing.assert_array_equal(on_device.table.numpy(), np.maximum(rows.table, 0))
    assert on_device.counts.tolist() == [3, 3, 3]
    on_device.refresh(rows, 20, CPU)
    assert on_device.counts.tolist() == [20, 20, 20]


def test_what_a_kernel_has_counted_is_not_written_again():
    rows, shelf = make_rows()
    on_device = Mirror()
    grow(rows, shelf, [3, 3])
    on_device.refresh(rows, 3, CPU)
    on_device.counts += 1
    rows.advance(np.array([1, 1]))
    on_device.advanced(rows, 4)
    on_device.counts[0] = 99  # to be seen if it stays
    on_device.refresh(rows, 4, CPU)
    assert on_device.read_counts().tolist() == [99, 4, 4]


def test_a_copy_makes_its_own():
    rows, shelf = make_rows()
    on_device = Mirror()
    grow(rows, shelf, [3, 3])
    on_device.refresh(rows, 3, CPU)
    other = pickle.loads(pickle.dumps(on_device))
    assert not other.counts.numel()
    other.refresh(rows, 3, CPU)
    assert other.counts.tolist() == [3, 3, 3]


def test_an_array_on_its_way_keeps_its_numbers():
    values = np.arange(4)
    moved = staged(values, CPU).to(CPU, non_blocking=True, copy=True)
    values += 1
    assert moved.tolist() == [0, 1, 2, 3]


def laid_out(lengths):
    pool = PagePool(8, (4, 6), torch.float32, torch.device("cpu"))
    rows = Rows(2, HeadRules.make((UNBOUNDED, 5, UNBOUNDED), (0, 1, 0), page_size=8))
    pool.hold(rows)
    pool.lay_out(rows, np.array(lengths))
    pool.pages.keys[:] = torch.arange(pool.size)[:, None, None]
    return pool, rows


def test_views_show_the_pages_of_every_row():
    pool, rows = laid_out([20, 20])
    whole, near = Mirror().views(rows, pool) or ()
    assert (whole.heads, near.heads) == ((0, 2), (1,))
    for view in (whole, near):
        (piece,) = view.pieces
        table = rows.table[:, list(view.heads), : piece.keys.shape[2] // 8]
        assert torch.equal(piece.keys[..., 0], torch.from_numpy(table).float().repeat_interleave(8, 2))
        assert piece.values.shape == (*piece.keys.shape[:3], 6)
        assert piece.keys.untyped_storage().data_ptr() == pool.pages.keys.untyped_storage().data_ptr()


def test_views_are_kept_until_a_table_or_the_pages_change():
    pool, rows = laid_out([20, 20])
    views = Mirror()
    first = views.views(rows, pool)
    assert views.views(rows, pool) is first
    pool.grow(pool.size + 1)
    second = views.views(rows, pool)
    assert second is not first
    pool.lay_out(rows, np.array([30, 30]))
    third = views.views(rows, pool)
    assert third is not second
    assert third[0].pieces[0].keys.shape[2] == 32
    assert pickle.loads(pickle.dumps(views)).views(rows, pool) is not third


def test_rows_with_other_numbers_of_pages_have_no_views():
    pool, rows = laid_out([20, 5])
    assert Mirror().views(rows, pool) is None


def test_laid_out_rows_are_runs_with_a_spare_page_behind_each_that_grows():
    rows, shelf = make_rows()
    grow(rows, shelf, [30, 30])
    before = rows.table.copy()
    source = rows.lay_out(np.array([41, 41]))
    assert stretches(rows) == (
        ((0,), (Stretch(0, 0, ((2, 7), (1, 0)), 6),)),
        ((1,), (Stretch(0, 14, ((2, 4), (1, 0)), 4),)),
        ((2,), (Stretch(0, 22, ((2, 2), (1, 0)), 2),)),
    )
    held = before != ABSENT
    assert (source[rows.table[:, :, :4][held]] == before[held]).all(), "every page goes where its row expects it"
    assert (source == ABSENT).sum() == len(source) - held.sum()
    free = np.setdiff1d(np.arange(len(source)), rows.table)
    rows.reserve(np.array([49, 49]), lambda count: free[:count])
    assert stretches(rows)[0][1] == (Stretch(0, 0, ((2, 7), (1, 0)), 7),), "the next pages are those behind the rows"


def test_scattered_or_unequal_rows_are_no_runs():
    rows, shelf = make_rows()
    grow(rows, shelf, [17, 17])
    assert stretches(rows) is not None
    grow(rows, shelf, [25, 25])
    assert [len(lie) for _, lie in stretches(rows)] == [2, 2, 1], "new pages came from elsewhere"
    for length in (33, 41, 49):
        grow(rows, shelf, [length, length])
    assert stretches(rows) is None, "those of the global row lie in too many places"
    rows.lay_out(np.array([49, 49]))
    assert stretches(rows) is not None
    rows, shelf = make_rows()
    grow(rows, shelf, [17, 17])
    rows.lay_out(np.array([25, 33]))
    assert stretches(rows) is None, "one row has more pages"
    assert stretches(make_rows()[0]) is None, "there is nothing yet"
