"""A layer's rows as plain tensors, where their pages lie in runs."""

from __future__ import annotations

from typing import Any

from redknot_kernels import Piece, RowView, view_rows
from torch import Tensor

from .pool import PagePool
from .rows import Rows


class RowViews:
    """Views of the pages of a layer's rows, made anew when the pages or the tables have changed."""

    def __init__(self) -> None:
        self._views: tuple[RowView, ...] | None = None
        self._of: tuple[Tensor, int] | None = None

    def refresh(self, rows: Rows, pool: PagePool) -> tuple[RowView, ...] | None:
        """The views of rows that are equally long, or `None` where pages do not lie in runs."""
        if self._of is None or self._of[0] is not pool.pages.keys or self._of[1] != rows.version:
            self._of = pool.pages.keys, rows.version
            self._views = _views(rows, pool)
        return self._views

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copy or a pickle makes its own."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()


def _views(rows: Rows, pool: PagePool) -> tuple[RowView, ...] | None:
    runs = rows.runs()
    if runs is None:
        return None
    size = pool.page_size
    return tuple(
        RowView(
            heads,
            tuple(
                Piece(run.column * size, *(view_rows(x, run.first, run.apart, run.columns) for x in pool.pages))
                for run in found
            ),
        )
        for heads, found in runs
    )
