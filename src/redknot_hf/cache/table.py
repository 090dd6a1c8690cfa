"""Page tables, and how often their pages are listed: reference counts and a free list, over integers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

Ids = Int[np.ndarray, " ids"]

ABSENT = -1


class References:
    """How often tables list each page of a pool, and a free list of those that none lists: O(1) a page.

    Pages are handed out in ascending order where they came back together, so that rows keep runs of pages.

    Attributes:
        counts: Listings of each page.
    """

    def __init__(self, pages: int = 0) -> None:
        self.counts: Int[np.ndarray, " pages"] = np.zeros(0, np.int64)
        self._stack: Ids = np.zeros(0, np.int64)  # the free pages are its first `free` entries, the next one last
        self.free = 0
        self._listed = 0
        self.resize(pages)

    @property
    def shared(self) -> bool:
        """Whether some page is listed more than once."""
        return self._listed > len(self.counts) - self.free

    def take(self, count: int) -> Ids:
        """Hands out free pages, each now listed once; there must be as many."""
        self.free -= count
        self._listed += count
        ids = self._stack[self.free : self.free + count][::-1].copy()
        self.counts[ids] = 1
        return ids

    def share(self, ids: Ids) -> None:
        """Counts another listing of each of these pages, free ones included."""
        np.add.at(self.counts, ids, 1)
        self._listed += len(ids)
        if self.free:
            self._restack()

    def release(self, ids: Ids) -> None:
        """Counts a listing less; pages that nobody lists any more are free."""
        np.subtract.at(self.counts, ids, 1)
        self._listed -= len(ids)
        free = np.unique(ids[self.counts[ids] == 0])[::-1]
        self._stack[self.free : self.free + len(free)] = free
        self.free += len(free)

    def resize(self, pages: int, listed: Ids | None = None) -> None:
        """Adds free pages up to a number in all; or counts anew, where every page has another number now."""
        old = self.counts if listed is None else np.bincount(listed, minlength=pages)
        self.counts = np.zeros(pages, np.int64)
        self.counts[: len(old)] = old
        self._listed = int(self.counts.sum())
        self._restack()

    def _restack(self) -> None:
        free = np.flatnonzero(self.counts == 0)[::-1]
        self.free = len(free)
        self._stack = np.zeros(len(self.counts), np.int64)
        self._stack[: self.free] = free


class PageTable:
    """The pages of some rows. It is an object of its own since it outlives rows that die, until they are uncounted.

    Attributes:
        ids: Page of each column of each row, `ABSENT` where there is none; `[batch, heads, columns]`.
        version: Grows with every change of `ids`.
        references: Of the pool that holds the pages; `None` while no pool does.
    """

    def __init__(self, ids: Int[np.ndarray, "batch heads columns"]) -> None:
        self.ids = ids
        self.version = 0
        self.references: References | None = None

    @property
    def listed(self) -> Ids:
        """Every page, as often as it stands in the table."""
        return self.ids[self.ids != ABSENT]

    def share(self, ids: Ids) -> None:
        """Counts pages that are listed once more."""
        if self.references is not None and len(ids):
            self.references.share(ids)

    def release(self, ids: Ids) -> None:
        """Counts pages that are listed once less."""
        if self.references is not None and len(ids):
            self.references.release(ids)

    def renumber(self, new: Int[np.ndarray, " pool"]) -> None:
        """Replaces every page id by `new[id]`."""
        held = self.ids != ABSENT
        self.ids[held] = new[self.ids[held]]
        self.version += 1

    def __getstate__(self) -> dict[str, Any]:
        """Without the counts, which are another pool's wherever this goes."""
        return {**vars(self), "references": None}
