"""Pages of tokens on one device, and who holds them."""

from __future__ import annotations

from copy import copy
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from jaxtyping import Float, Int
from redknot_kernels import Pages, copy_pages
from torch import Tensor

from .device_rows import staged
from .rows import ABSENT, Ids, Rows


class PagePool:
    """Keys and values of one layer, page by page.

    A page is free when no table lists it, so nothing can leak: rows that are cut, dropped or garbage-collected give
    their pages back without a word. The pool grows and shrinks by whole pages, layer by layer: while it is resized,
    one layer's keys (or values) stand in memory twice, not the cache.

    Attributes:
        pages: Keys and values. Always finite, so that a masked slot cannot spoil a sum.
        fixed: The number of pages is settled (`max_cache_len`).
        shared: Some page may have several holders.
    """

    def __init__(
        self, page_size: int, dims: tuple[int, int], dtype: torch.dtype, device: torch.device, pages: int | None = None
    ) -> None:
        self.page_size = page_size
        self.fixed = pages is not None
        self.shared = False
        with torch.inference_mode(False):  # so that what was made in inference mode can be written outside of it
            self.pages = Pages(*(torch.zeros(pages or 0, page_size, dim, dtype=dtype, device=device) for dim in dims))
        self._holders: WeakSet[Rows] = WeakSet()
        self._holders_seen = 0

    @property
    def size(self) -> int:
        """Number of pages, free ones included."""
        return len(self.pages.keys)

    @property
    def free(self) -> int:
        """Number of pages that nobody holds."""
        return int((self.refs() == 0).sum())

    @property
    def nbytes(self) -> int:
        """Bytes that the pages occupy."""
        return sum(x.untyped_storage().nbytes() for x in self.pages)

    def hold(self, rows: Rows) -> None:
        """Remembers a holder of pages, for as long as it lives."""
        self.shared = self.shared or len(self._holders) > 0
        self._holders.add(rows)
        self._holders_seen = len(self._holders)

    def lost_a_holder(self) -> bool:
        """Whether a holder has died since this was asked last, so that its pages may go."""
        seen, self._holders_seen = self._holders_seen, len(self._holders)
        return self._holders_seen < seen

    def refs(self) -> Int[np.ndarray, " pages"]:
        """How often each page is listed."""
        listed = [rows.table[rows.table != ABSENT] for rows in self._holders]
        refs = np.bincount(np.concatenate(listed), minlength=self.size) if listed else np.zeros(self.size, np.int64)
        self.shared = bool((refs > 1).any())
        return refs

    def allocate(self, count: int, spare: int = 0) -> Ids:
        """Finds `count` free pages; where the pool must grow, by `spare` more, so that it need not the next time.

        Raises:
            RuntimeError: The pool is fixed and full.
        """
        free = np.flatnonzero(self.refs() == 0)
        if len(free) < count:
            if self.fixed:
                raise RuntimeError(
                    f"the pool is full: {count} pages of {self.page_size} tokens are needed and {len(free)} of "
                    f"{self.size} are free. max_cache_len reserves them for the first batch: forks and repeated "
                    "sequences need pages of their own. Make the cache without max_cache_len, so that it grows."
                )
            grown = np.arange(self.size, self.size + count - len(free) + spare)
            self.grow(self.size + len(grown))
            free = np.concatenate([free, grown])
        return free[:count]

    def alone(self, rows: Rows) -> bool:
        """Whether all pages are free or these rows', each listed once, and may be put into another order."""
        sole = not self.fixed and len(self._holders) == 1 and rows in self._holders
        return sole and bool(self.refs().max(initial=0) < 2)

    def lay_out(self, rows: Rows, lengths: Int[np.ndarray, " batch"]) -> None:
        """Gives rows that are alone here runs of pages with room for these lengths; the pool gets the size of that."""
        self._rebuild(rows.lay_out(lengths))

    def grow(self, pages: int) -> None:
        """Adds free pages, up to this number in all."""
        if pages > self.size:
            self._rebuild(np.append(np.arange(self.size), np.full(pages - self.size, ABSENT)))

    def trim(self, spare: int) -> None:
        """Gives free pages beyond `spare` back to the device, unless the pool is fixed."""
        refs = self.refs()
        free = np.flatnonzero(refs == 0)
        if self.fixed or len(free) <= spare:
            return
        kept = np.concatenate([np.flatnonzero(refs), free[:spare]])
        new = np.full(self.size, ABSENT, np.int32)
        new[kept] = np.arange(len(kept))
        self._rebuild(kept)
        for rows in self._holders:
            rows.renumber(new)

    def copy(self, source: Ids, target: Ids) -> None:
        """Copies pages to pages."""
        if len(source):
            copy_pages(self.pages, self._on_device(source), self._on_device(target))

    def clone(self) -> PagePool:
        """A pool of its own with the same pages, held by nobody."""
        other = copy(self)
        other._holders, other._holders_seen, other.shared = WeakSet(), 0, False
        with torch.inference_mode(False):
            other.pages = Pages(*(x.clone() for x in self.pages))
        return other

    def to(self, device: torch.device) -> None:
        """Moves all pages to a device."""
        waits = device.type == "cpu"  # the host may read at once what a device still writes
        with torch.inference_mode(False):
            self.pages = Pages(*(x.to(device, non_blocking=not waits) for x in self.pages))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the holders, who come forward themselves."""
        return {**vars(self), "_holders": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._holders = WeakSet()

    def _rebuild(self, source: Ids) -> None:
        """Makes page i what page `source[i]` was, or empty; keys first: only one copy is extra."""
        where, empty = self._on_device(np.maximum(source, 0)), self._on_device(np.flatnonzero(source == ABSENT))
        with torch.inference_mode(False):
            for name in Pages._fields:
                self.pages = self.pages._replace(**{name: _rebuilt(getattr(self.pages, name), where, empty)})

    def _on_device(self, ids: Ids) -> Int[Tensor, " ids"]:
        return staged(ids.astype(np.int64), self.pages.device).to(self.pages.device, non_blocking=True)


def _rebuilt(
    pages: Float[Tensor, "pages page_size dim"], source: Int[Tensor, " new"], empty: Int[Tensor, " empty"]
) -> Float[Tensor, "new page_size dim"]:
    if not len(pages):
        return pages.new_zeros(len(source), *pages.shape[1:])
    return pages.index_select(0, source).index_fill_(0, empty, 0)
