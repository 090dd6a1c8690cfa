"""A layer's rows as kernels read them: on the device, or as views of pages that follow each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from redknot_kernels import Piece, RowView, view_rows
from torch import Tensor

from .pool import PagePool, staged
from .rows import Rows
from .table import ABSENT


class Stretch(NamedTuple):
    """Columns of some heads' rows in which the pages of each row follow each other.

    Attributes:
        column: The first of them.
        first: Page at which the first row's part begins.
        apart: Number of sequences and of heads, each with the pages from one to the next.
        columns: Pages of each row.
    """

    column: int
    first: int
    apart: tuple[tuple[int, int], tuple[int, int]]
    columns: int


Kinds = tuple[tuple[tuple[int, ...], tuple[Stretch, ...]], ...]
_MOST_STRETCHES = 4  # of a row; each is attended apart


class Mirror:
    """A copy of a layer's rows for kernels. It may run ahead of the host: a captured step counts on the device only.

    Tensors are written in place as long as their shapes allow it, so that a captured graph keeps reading them.

    Attributes:
        table: Page of each column of each row; absent pages read as page 0.
        counts: Tokens of each sequence, and last the slots of all.
        bounds: Window, sink and ring of each head.
        most_kept: Slots that the rows of one sequence may use.
    """

    def __init__(self) -> None:
        self.table: Int[Tensor, "batch heads columns"] = torch.empty(0, 0, 0, dtype=torch.int32)
        self.counts: Int[Tensor, " batch_and_slots"] = torch.empty(0, dtype=torch.int32)
        self.bounds: Int[Tensor, "rules heads"] = torch.empty(0, 0, dtype=torch.int32)
        self.most_kept = 0
        self._version = -1
        self._lengths: Int[np.ndarray, " batch"] | None = None  # whose counts these are; never written in place
        self._slots = 0
        self._views: tuple[RowView, ...] | None = None
        self._views_of: tuple[Tensor, int] | None = None

    def refresh(self, rows: Rows, slots: int, device: torch.device) -> None:
        """Brings what has changed on the host to the device."""
        self.refresh_table(rows, device)
        if self.counts.device != device or rows.lengths is not self._lengths or slots != self._slots:
            self.counts = put(np.append(rows.lengths, slots).astype(np.int32), self.counts, device)
            self.advanced(rows, slots)

    def refresh_table(self, rows: Rows, device: torch.device) -> None:
        """Brings the page table alone, and the rules."""
        if self.table.device != device or self._version != rows.version:
            self._version = rows.version
            self.table = put(np.maximum(rows.table, 0), self.table, device)
            self.bounds = rows.rules.tensors(device)
            self.most_kept = rows.rules.most_kept(rows.table.shape[2])

    def advanced(self, rows: Rows, slots: int) -> None:
        """Remembers that a kernel has counted what the host has counted too."""
        self._lengths, self._slots = rows.lengths, slots

    def read_counts(self) -> Int[np.ndarray, " batch_and_slots"]:
        """Reads the counts; waits for the device."""
        return self.counts.cpu().numpy().astype(np.int64)

    def views(self, rows: Rows, pool: PagePool) -> tuple[RowView, ...] | None:
        """Rows as plain tensors, or `None` where they are not equally long or pages do not follow each other."""
        if len(rows.lengths) > 1 and not rows.level:
            return None
        keys, version = pool.pages.keys, rows.page_table.version
        if self._views_of is None or self._views_of[0] is not keys or self._views_of[1] != version:
            self._views_of = keys, version
            self._views = _views(rows, pool)
        return self._views

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copy or a pickle makes its own."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()


def stretches(rows: Rows) -> Kinds | None:
    """Where the rows of each kind of head lie, if they can be read without a table.

    That is where the rows of a kind have as many pages, and these follow each other, in a few stretches at most, in
    which the rows stand at equal distances; otherwise `None`.
    """
    found = [(tuple(heads), _stretches(rows.table[:, heads])) for heads in rows.kinds()]
    return tuple((heads, lie) for heads, lie in found if lie) if all(lie for _, lie in found) else None


def _views(rows: Rows, pool: PagePool) -> tuple[RowView, ...] | None:
    found = stretches(rows)
    if found is None:
        return None
    return tuple(
        RowView(
            heads,
            tuple(
                Piece(x.column * pool.page_size, *(view_rows(p, x.first, x.apart, x.columns) for p in pool.pages))
                for x in lie
            ),
        )
        for heads, lie in found
    )


def _stretches(table: Int[np.ndarray, "batch heads columns"]) -> tuple[Stretch, ...] | None:
    held = (table != ABSENT).sum(2)
    columns = int(held.max(initial=0))
    if columns == 0 or (held < columns).any():
        return None
    table = table[:, :, :columns]
    seams = np.flatnonzero((np.diff(table) != 1).any((0, 1))) + 1
    if len(seams) >= _MOST_STRETCHES:
        return None
    found = [
        _stretch(start, part) for start, part in zip([0, *seams.tolist()], np.split(table, seams, 2), strict=True)
    ]
    return None if None in found else tuple(filter(None, found))


def _stretch(column: int, table: Int[np.ndarray, "batch heads columns"]) -> Stretch | None:
    batch, heads, columns = table.shape
    first, last_sequence, last_head = (int(table[at]) for at in ((0, 0, 0), (-1, 0, 0), (0, -1, 0)))
    sequence, head = (last_sequence - first) // max(1, batch - 1), (last_head - first) // max(1, heads - 1)
    starts = first + np.add.outer(np.arange(batch) * sequence, np.arange(heads) * head)
    if min(sequence, head) < 0 or not np.array_equal(table[:, :, 0], starts):
        return None
    return Stretch(column, first, ((batch, sequence), (heads, head)), columns)


def put(values: np.ndarray, old: Tensor, device: torch.device) -> Tensor:
    """Brings numbers to a device: into the old tensor where they fit it, so that graphs keep reading them."""
    new = staged(values, device)
    if old.shape == new.shape and old.device == device:
        return old.copy_(new, non_blocking=True)
    with torch.inference_mode(False):  # so that what was made in inference mode can be written outside of it
        put = new.to(device, non_blocking=True, copy=True)
    # Graphs are captured over these tensors; compiled code need not be made anew for another cache's.
    torch._dynamo.mark_static_address(put, guard=False)
    return put
