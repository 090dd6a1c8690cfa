"""Pages of tokens on one device, and who holds them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from copy import copy
from threading import Lock
from typing import Any, TypeVar
from weakref import finalize, ref

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from redknot_kernels import Pages, copy_pages
from torch import Tensor

from .rows import Rows
from .table import ABSENT, Ids, PageTable, References

# A pool that several hold grows by an eighth at least, and gives back no less while they are several: each time all
# of it is copied, so that many holders that grow or go one by one would else copy it as often as they are many.
_SHARE = 8

Pool = TypeVar("Pool", bound="PagePool")


class PagePool:
    """Keys and values of one layer, page by page.

    Pages are counted where tables list them (reference counts), and a page that none lists is free. Rows that are
    garbage-collected give their pages back too, at once or, if the pool is at work just then, when that is done. The
    pool grows and shrinks by whole pages, layer by layer: while it is resized, one layer's keys (or values) stand in
    memory twice, not the cache.

    Forks hold pages of one pool, and may be used from different threads: whoever reads or writes rows or pages that
    others may hold does so under `lock`, from reserving pages until the kernels have been called.

    Attributes:
        pages: Keys and values. Always finite, so that a masked slot cannot spoil a sum.
        fixed: The number of pages is settled (`max_cache_len`), until other rules need fewer.
        lock: Not re-entrant. Methods of the pool and of its rows do not take it themselves.
        references: How often each page is listed, and which are free.
        gone: Tables of rows that have died, still counted; `collect` frees what they list.
    """

    def __init__(
        self, page_size: int, dims: tuple[int, int], dtype: torch.dtype, device: torch.device, pages: int | None = None
    ) -> None:
        self.page_size = page_size
        self.fixed = pages is not None
        with torch.inference_mode(False):  # so that what was made in inference mode can be written outside of it
            self.pages = Pages(*(torch.zeros(pages or 0, page_size, dim, dtype=dtype, device=device) for dim in dims))
        self._held_by_nobody()

    def _held_by_nobody(self) -> None:
        self.lock = Lock()
        self.references = References(self.size)
        self._holders: dict[PageTable, ref[Rows]] = {}
        self.gone: deque[PageTable] = deque()

    @property
    def size(self) -> int:
        """Number of pages, free ones included."""
        return len(self.pages[0])

    @property
    def free(self) -> int:
        """Number of pages that nobody holds."""
        return self.references.free

    @property
    def shared(self) -> bool:
        """Whether some page is listed more than once."""
        return self.references.shared

    @property
    def nbytes(self) -> int:
        """Bytes that the pages occupy."""
        return sum(x.untyped_storage().nbytes() for x in self.pages)

    def hold(self, rows: Rows) -> None:
        """Counts the pages that rows list, from now on and for as long as they live."""
        table = rows.page_table
        self._holders[table] = ref(rows)
        table.references = self.references
        table.share(table.listed)
        finalize(rows, _rows_died, ref(self), table).atexit = False

    def collect(self) -> None:
        """Takes back the pages of rows that have died."""
        if self.gone:
            while self.gone:
                table = self.gone.popleft()
                del self._holders[table]
                table.release(table.listed)
            self.shrink(self.size // _SHARE)

    def shrink(self, at_most: int = 0) -> None:
        """Gives free pages back to the device, apart from one for each row that grows for ever.

        Args:
            at_most: Free pages beyond which it does so while several hold pages.
        """
        rows = [x for x in (holder() for holder in self._holders.values()) if x is not None]
        if self.fixed or not rows:
            return
        spare = max(x.unbounded for x in rows)
        if self.alone(rows[0]):
            if self.free > spare:
                self.lay_out(rows[0], rows[0].lengths)
        elif self.free > max(spare, at_most if len(rows) > 1 else 0):
            self.trim(spare)

    def refs(self) -> Int[np.ndarray, " pages"]:
        """How often each page is listed, counted anew from all tables: what `references` must say."""
        listed = [table.listed for table in self._holders]
        return np.bincount(np.concatenate(listed), minlength=self.size) if listed else np.zeros(self.size, np.int64)

    def listed_by_head(self, holders: Iterable[Rows] | None = None) -> Bool[np.ndarray, "heads pages"]:
        """Which pages rows of each head list; of all holders, or of some. All of them have as many heads."""
        found = list(self._holders) if holders is None else [rows.page_table for rows in holders]
        tables = [table.ids for table in found]
        listed = np.zeros((tables[0].shape[1] if tables else 0, self.size), np.bool_)
        for table in tables:
            _, head, _ = at = np.nonzero(table != ABSENT)
            listed[head, table[at]] = True
        return listed

    def allocate(self, count: int, spare: int = 0) -> Ids:
        """Hands out `count` free pages; where the pool must grow, by `spare` more, so that it need not the next time.

        Raises:
            RuntimeError: The pool is fixed and full.
        """
        missing = count - self.free
        if missing > 0:
            if self.fixed:
                raise RuntimeError(
                    f"the pool is full: {count} pages of {self.page_size} tokens are needed and {self.free} of "
                    f"{self.size} are free. max_cache_len reserves them for the first batch: forks and repeated "
                    "sequences need pages of their own. Make the cache without max_cache_len, so that it grows."
                )
            if len(self._holders) > 1:
                spare = max(spare, self.size // _SHARE)
            self.grow(self.size + missing + spare)
        return self.references.take(count)

    def alone(self, rows: Rows) -> bool:
        """Whether all pages are free or these rows', each listed once, and may be put into another order."""
        return not self.fixed and len(self._holders) == 1 and rows.page_table in self._holders and not self.shared

    def make_room(self, rows: Rows, lengths: Int[np.ndarray, " batch"]) -> None:
        """Gives rows the pages to hold sequences of these lengths, pages of their own where they will write."""
        allocate = lambda count: self.allocate(count, spare=rows.unbounded)  # noqa: E731
        if self.shared:
            self.copy(*rows.unshare(lengths, self.references.counts, allocate))
        if self.alone(rows) and rows.pages_missing(lengths) > self.free:
            self.lay_out(rows, lengths)  # growing copies everything in any case
        else:
            rows.reserve(lengths, allocate)

    def lay_out(self, rows: Rows, lengths: Int[np.ndarray, " batch"]) -> None:
        """Gives rows that are alone here runs of pages with room for these lengths; the pool gets the size of that."""
        self._rebuild(rows.lay_out(lengths))
        self.references.resize(self.size, rows.page_table.listed)

    def grow(self, pages: int) -> None:
        """Adds free pages, up to this number in all."""
        if pages > self.size:
            self._rebuild(np.append(np.arange(self.size), np.full(pages - self.size, ABSENT)))
            self.references.resize(pages)

    def trim(self, spare: int) -> None:
        """Gives free pages beyond `spare` back to the device."""
        counts = self.references.counts
        if self.free <= spare:
            return
        kept = np.concatenate([np.flatnonzero(counts), np.flatnonzero(counts == 0)[:spare]])
        new = np.full(self.size, ABSENT, np.int32)
        new[kept] = np.arange(len(kept))
        self._rebuild(kept)
        self.references.resize(len(kept), np.repeat(np.arange(len(kept)), counts[kept]))
        for table in self._holders:
            table.renumber(new)

    def copy(self, source: Ids, target: Ids) -> None:
        """Copies pages to pages."""
        if len(source):
            copy_pages(self.pages, self._on_device(source), self._on_device(target))

    def clone(self: Pool) -> Pool:
        """A pool of its own with the same pages, held by nobody."""
        other = copy(self)
        with torch.inference_mode(False):
            other.pages = self.pages._make(x.clone() for x in self.pages)
        other._held_by_nobody()
        return other

    def part(self: Pool, rows: Rows) -> tuple[Pool, Rows]:
        """Copies of some rows and of the pages that they list alone, held by nobody: what a pickle of them takes."""
        pages, mine = np.unique(rows.page_table.listed), rows.fork()
        new = np.full(self.size, ABSENT, np.int32)
        new[pages] = np.arange(len(pages))
        mine.page_table.renumber(new)
        other, where = copy(self), self._on_device(pages)
        with torch.inference_mode(False):
            other.pages = self.pages._make(x.index_select(0, where) for x in self.pages)
        other._held_by_nobody()
        return other, mine

    def to(self, device: torch.device) -> None:
        """Moves all pages to a device."""
        waits = device.type == "cpu"  # the host may read at once what a device still writes
        with torch.inference_mode(False):
            self.pages = self.pages._make(x.to(device, non_blocking=not waits) for x in self.pages)

    def empty(self) -> None:
        """Gives all pages to the device, also those that are listed: nothing may read or write them any more."""
        with torch.inference_mode(False):
            self.pages = self.pages._make(x.new_empty(0, *x.shape[1:]) for x in self.pages)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the holders, who come forward themselves."""
        return {name: x for name, x in vars(self).items() if name in ("page_size", "fixed", "pages")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._held_by_nobody()

    def _rebuild(self, source: Ids) -> None:
        """Makes page i what page `source[i]` was, or empty; keys first: only one copy is extra."""
        where, empty = self._on_device(np.maximum(source, 0)), self._on_device(np.flatnonzero(source == ABSENT))
        with torch.inference_mode(False):
            for name in self.pages._fields:
                self.pages = self.pages._replace(**{name: _rebuilt(getattr(self.pages, name), where, empty)})

    def _on_device(self, ids: Ids) -> Int[Tensor, " ids"]:
        device = self.pages[0].device
        return staged(ids.astype(np.int64), device).to(device, non_blocking=True)


def staged(values: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor of the host from which a copy to the device waits for nothing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _rows_died(pool: ref[PagePool], table: PageTable) -> None:
    """Lets a pool take pages back; whoever works with it now will do so later."""
    found = pool()
    if found is None:
        return
    found.gone.append(table)
    if found.lock.acquire(blocking=False):
        try:
            found.collect()
        finally:
            found.lock.release()


def _rebuilt(
    pages: Shaped[Tensor, "pages ..."], source: Int[Tensor, " new"], empty: Int[Tensor, " empty"]
) -> Shaped[Tensor, "new ..."]:
    if not len(pages):
        return pages.new_zeros(len(source), *pages.shape[1:])
    return pages.index_select(0, source).index_fill_(0, empty, 0)
