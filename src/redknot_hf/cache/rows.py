"""Which pages each row of a layer owns: bookkeeping over integers, without a tensor in sight.

A row is one KV head of one sequence. Its pages are listed in `table`; `redknot_kernels.rules` says which slot a
position has. Pages may stand in several tables, or several times in one: they are shared, and copied before they are
written (copy-on-write).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import le
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from .kinds import kinds, most_pages, places_of
from .table import ABSENT, Ids, PageTable

if TYPE_CHECKING:
    from redknot_kernels import HeadRules

Allocate = Callable[[int], Ids]


class Lacking(NamedTuple):
    """What rows lack to hold longer sequences.

    Attributes:
        columns: That their table must have.
        places: Where pages are missing in a table of so many columns, in the order in which they get them.
        whole: Lengths up to which the rows may be written then.
    """

    columns: int
    places: Ids
    whole: Int[np.ndarray, " batch"]


class Rows:
    """The rows of one layer.

    Attributes:
        rules: What each KV head keeps.
        page_table: The pages of each row, which it counts where a pool holds them.
        lengths: Tokens of each sequence, padding not counted; `[batch]`. Replaced when it changes, never written.
    """

    def __init__(self, batch: int, rules: HeadRules) -> None:
        self.rules = rules
        self.page_table = PageTable(np.full((batch, rules.heads, 0), ABSENT, np.int32))
        self.lengths: Int[np.ndarray, " batch"] = np.zeros(batch, np.int64)
        # Rings lose what lies `ring` behind the end; after a cut, what they had lost before stays lost.
        self._floor: Int[np.ndarray, "batch heads"] = np.zeros((batch, rules.heads), np.int64)
        # Up to these lengths rows have pages that nobody else lists, so that they may be written.
        self._room = self.lengths.copy()

    @property
    def table(self) -> Int[np.ndarray, "batch heads columns"]:
        """Page of each column of each row, `ABSENT` where there is none."""
        return self.page_table.ids

    @property
    def version(self) -> int:
        """Grows with every change of the table."""
        return self.page_table.version

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def level(self) -> bool:
        """Whether all sequences are equally long."""
        return len(set(self.lengths.tolist())) < 2

    @property
    def owned(self) -> bool:
        """Whether what is written next lies in pages that nobody else lists, be they shared by others or not."""
        references = self.page_table.references
        unshared = references is None or not references.shared
        return unshared or bool((self.lengths < self._room).all())

    @property
    def unbounded(self) -> int:
        """Number of rows that grow for ever."""
        return self.batch * len(self.rules.global_heads)

    def pages_needed(self, lengths: Int[np.ndarray, " batch"]) -> Int[np.ndarray, "batch heads"]:
        """Pages of each row when the sequences have these lengths."""
        pages = -(-lengths // self.rules.page_size)
        return np.minimum(pages[:, None], most_pages(self.rules))

    def has_room(self, lengths: Int[np.ndarray, " batch"]) -> bool:
        """Whether every row has the pages to hold sequences of these lengths, and may write to them."""
        return all(map(le, lengths.tolist(), self._room.tolist()))  # for few sequences faster than numpy

    def pages_missing(self, lengths: Int[np.ndarray, " batch"]) -> int:
        """Pages that the rows lack to hold sequences of these lengths."""
        return int(np.maximum(self.pages_needed(lengths) - (self.table != ABSENT).sum(2), 0).sum())

    def reserve(self, lengths: Int[np.ndarray, " batch"], allocate: Allocate) -> None:
        """Gives every row the pages it needs to hold sequences of these lengths; shared ones are not copied."""
        if not self.has_room(lengths):
            self.take(self.lacking(lengths), allocate)

    def lacking(self, lengths: Int[np.ndarray, " batch"]) -> Lacking:
        """What rows lack to hold sequences of these lengths."""
        needed = self.pages_needed(lengths)
        held, columns = self.table, max(int(needed.max(initial=0)), self.table.shape[2])
        lacks = np.arange(columns) < needed[:, :, None]
        lacks[:, :, : held.shape[2]] &= held == ABSENT
        return Lacking(columns, places_of(lacks, self.rules), self._whole(lengths))

    def take(self, lacking: Lacking, allocate: Allocate) -> None:
        """Gives rows what they lack, or what others of equal rules and lengths do, which hold as many pages."""
        columns, places, whole = lacking
        held, self._room = self.table, np.maximum(self._room, whole)
        if columns > held.shape[2]:
            self.page_table.ids = np.full((*held.shape[:2], columns), ABSENT, np.int32)
            self.table[:, :, : held.shape[2]] = held
        if len(places):
            self.table.flat[places] = allocate(len(places))
            self.page_table.version += 1

    def lay_out(self, lengths: Int[np.ndarray, " batch"]) -> Ids:
        """Gives every row one run of pages, with room for sequences of these lengths.

        Behind a row that grows for ever one page stays free, which it gets next. Global rows come first and local ones
        after them, so that each kind can be read as one array where the rows are equally long. The pages must be
        nobody else's, and none may be listed twice.

        Returns:
            For each page of the new numbering the old one, `ABSENT` where it is new.
        """
        needed = np.maximum(self.pages_needed(lengths), (self.table != ABSENT).sum(2))
        room = needed + self._is_global()
        first, taken = np.empty_like(room), 0
        for heads in self.kinds():
            ends = taken + room[:, heads].cumsum().reshape(self.batch, -1)
            first[:, heads], taken = ends - room[:, heads], ends[-1, -1]
        old = self.table[:, :, : needed.max(initial=0)]
        columns = np.arange(needed.max(initial=0), dtype=np.int32)
        self.page_table.ids = (first[:, :, None] + columns).astype(np.int32)
        source = np.full(taken, ABSENT, np.int64)
        held = old != ABSENT
        source[self.table[:, :, : old.shape[2]][held]] = old[held]
        self.table[~self._columns_below(needed)] = ABSENT
        self.page_table.version += 1
        self._room = np.maximum(self._room, self._whole(lengths))
        return source

    def unshare(
        self, lengths: Int[np.ndarray, " batch"], refs: Int[np.ndarray, " pool"], allocate: Allocate
    ) -> tuple[Ids, Ids]:
        """Gives every row its own copy of the shared pages that growing to `lengths` writes.

        Local rows are small and get all of their shared pages at once.

        Returns:
            Pages to copy from and to.
        """
        first = np.where(self._is_global(), (self.lengths // self.rules.page_size)[:, None], 0)
        growing = (lengths > self.lengths)[:, None, None]
        touched = growing & ~self._columns_below(first) & (self.table != ABSENT)
        touched[touched] = refs[self.table[touched]] > 1
        where = places_of(touched, self.rules)
        pages = self.table.flat[where]
        unique, index, count = np.unique(pages, return_index=True, return_counts=True)
        stay = index[count == refs[unique]]  # nobody else holds the page: its first holder keeps it
        where, pages = np.delete(where, stay), np.delete(pages, stay)
        if len(pages):
            copies = allocate(len(pages))
            self.table.flat[where] = copies
            self.page_table.release(pages)
            self.page_table.version += 1
            return pages, copies
        return pages, pages

    def advance(self, counts: Int[np.ndarray, " batch"]) -> None:
        """Counts tokens that were written."""
        self.lengths = self.lengths + counts

    def count_span(self, sequence: int, count: int, since: Int[np.ndarray, " heads"]) -> None:
        """Counts tokens of one sequence of which rows may hold the last only.

        Args:
            sequence: Which sequence.
            count: Tokens it grows by.
            since: Position from which on each row holds all of them; what lies between it and the old end is missing.
        """
        gap = since > self.lengths[sequence]
        self._floor[sequence] = np.where(gap, since, self._floor[sequence])
        self.lengths = self.lengths.copy()
        self.lengths[sequence] += count

    def oldest(self) -> Int[np.ndarray, "batch heads"]:
        """First position, behind the sinks, that each row still holds, in cold pages too."""
        return np.maximum(self._floor, self.lengths[:, None] - np.array(self.rules.as_seen.ring))

    def missing_after(self, lengths: Int[np.ndarray, " batch"]) -> int:
        """Tokens that a next query would miss if the sequences were cut back to `lengths`; 0 if none."""
        sink = np.array(self.rules.as_seen.sink)
        wanted = np.maximum(lengths[:, None] - np.array(self.rules.window) + 1, sink)
        lost = np.minimum(self.oldest(), lengths[:, None]) - wanted
        return int(lost.max(initial=0))

    def cut(self, lengths: Int[np.ndarray, " batch"]) -> None:
        """Cuts the sequences back to `lengths` and drops the pages that hold nothing any more."""
        needed = self.pages_needed(lengths)
        self._drop(~self._columns_below(needed))
        self.page_table.ids = self.table[:, :, : needed.max(initial=0)]
        self._floor = np.minimum(self.oldest(), lengths[:, None])
        self.lengths = lengths
        self._room = np.minimum(self._room, lengths)
        references, size = self.page_table.references, self.rules.page_size
        if references is not None and not references.shared:
            self._room = -(-self._room // size) * size
        self.page_table.version += 1

    def select(self, index: Int[np.ndarray, " selected"]) -> None:
        """Makes row i what row `index[i]` was; pages are shared, not copied."""
        times = np.bincount(index, minlength=self.batch)
        again = np.repeat(np.arange(self.batch), np.maximum(times - 1, 0))
        more, less = self.table[again], self.table[times == 0]
        self.page_table.share(more[more != ABSENT])
        self.page_table.release(less[less != ABSENT])
        self.page_table.ids, self.lengths, self._floor, self._room = (
            x[index] for x in (self.table, self.lengths, self._floor, self._room)
        )
        if len(again):
            self._room = np.zeros_like(self._room)
        self.page_table.version += 1

    def positions_held(self, sequence: int, head: int) -> Int[np.ndarray, " tokens"]:
        """Positions whose tokens a row still holds, in order."""
        sink, length = self.rules.as_seen.sink[head], int(self.lengths[sequence])
        first = max(int(self.oldest()[sequence, head]), sink)
        return np.concatenate([np.arange(min(sink, length)), np.arange(first, max(first, length))])

    def change_rules(self, rules: HeadRules, heads: Sequence[int]) -> None:
        """Takes other rules for some heads, whose rows lose their pages: the caller writes them anew.

        What their rings had lost stays lost.
        """
        self._floor[:, heads] = self.oldest()[:, heads]
        changed = np.isin(np.arange(self.rules.heads), heads)[None, :, None]
        self._drop(np.broadcast_to(changed, self.table.shape))
        self.rules = rules
        self._room = np.zeros_like(self._room)
        self.page_table.version += 1

    def fork(self) -> Rows:
        """Another holder of the same pages, which neither side may write any more."""
        self._room = np.zeros_like(self._room)
        other = Rows(self.batch, self.rules)
        other.page_table.ids, other.lengths, other._floor, other._room = (
            x.copy() for x in (self.table, self.lengths, self._floor, self._room)
        )
        return other

    def become(self, other: Rows, pages: Ids) -> None:
        """Holds what other rows hold, of which page i is page `pages[i]` here; these rows must hold nothing."""
        self.page_table.ids = np.where(other.table == ABSENT, ABSENT, pages[other.table]).astype(np.int32)
        self.lengths, self._floor = other.lengths.copy(), other._floor.copy()
        self._room = np.zeros_like(self.lengths)
        self.page_table.version += 1

    def _whole(self, lengths: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
        """Lengths for which rows have pages of their own where sequences grow to these."""
        size = self.rules.page_size
        return np.where(lengths > self.lengths, -(-lengths // size) * size, lengths)

    def _drop(self, dropped: Bool[np.ndarray, "batch heads columns"]) -> None:
        """Takes pages out of the table."""
        dropped = dropped & (self.table != ABSENT)
        self.page_table.release(self.table[dropped])
        self.page_table.ids = np.where(dropped, ABSENT, self.table).astype(np.int32)

    def kinds(self) -> list[list[int]]:
        """The heads that grow for ever, and the others by equal rules."""
        return [list(heads) for heads in kinds(self.rules)]

    def _is_global(self) -> Bool[np.ndarray, " heads"]:
        mask = np.zeros(self.rules.heads, bool)
        mask[list(self.rules.global_heads)] = True
        return mask

    def _columns_below(self, limit: Int[np.ndarray, "batch heads"]) -> Bool[np.ndarray, "batch heads columns"]:
        return np.arange(self.table.shape[2]) < limit[:, :, None]
