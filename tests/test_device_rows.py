"""What kernels read of the rows follows the host, in the same tensors where it can."""

import pickle

import numpy as np
import torch
from layers import grow, make_rows

from redknot_hf.cache.device_rows import DeviceRows, staged

CPU = torch.device("cpu")


def test_tables_and_counts_follow_the_rows():
    rows, shelf = make_rows()
    on_device = DeviceRows()
    for lengths in ([5, 0], [9, 30], [9, 31]):
        grow(rows, shelf, lengths)
        on_device.refresh(rows, max(lengths), CPU)
        np.testing.assert_array_equal(on_device.table.numpy(), np.maximum(rows.table, 0))
        assert on_device.counts.tolist() == [*lengths, max(lengths)]
    assert on_device.bounds.tolist() == rows.rules.tensors(CPU).tolist()
    assert on_device.most_kept == rows.rules.most_kept(rows.table.shape[2])


def test_tensors_stay_where_they_are_as_long_as_their_shapes_do():
    rows, shelf = make_rows()
    on_device = DeviceRows()
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
    on_device = DeviceRows()
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
    on_device = DeviceRows()
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
    on_device = DeviceRows()
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
