"""The cold pages of a layer's stored rows: how many of each are cold, and for each storage their tables and a pool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from redknot_kernels import UNBOUNDED, Cold, ColdPages, HeadRules, cold_pool, dequantise_page, quantise_page
from torch import Tensor

from .mirror import put
from .pool import PagePool, staged
from .rows import Rows

NAMES = {8: "int8", 4: "int4"}
_Places = Int[np.ndarray, " kept"]


class ColdPool(PagePool):
    """Pages of one storage."""

    pages: ColdPages  # pyright: ignore[reportIncompatibleVariableOverride] - a pair of tensors, as hot ones are

    def __init__(
        self, bits: int, page_size: int, dims: tuple[int, int], device: torch.device, pages: int | None = None
    ) -> None:
        self.page_size = page_size
        self.fixed = pages is not None
        with torch.inference_mode(False):
            self.pages = cold_pool(pages or 0, bits, page_size, dims, device)
        self._held_by_nobody()


class Part(NamedTuple):
    """Cold pages of one storage.

    Attributes:
        rows: A row for every head; those of other storages have no pages. A length is that of the cold pages alone.
        pool: The pages, which forks may hold too.
    """

    rows: Rows
    pool: ColdPool


class ColdRows:
    """Which pages of stored rows are cold, and where they lie.

    A page is written once, so that forks share it for good. All stored rows of a sequence have equally many cold
    pages, and that number never falls, unless the sequence is cut back to its first page. The lock of the hot pages'
    pool holds for these pools too.

    Attributes:
        rules: Of all heads of the layer.
        counts: Cold pages of every stored row; `[batch]`. Replaced when it changes, never written.
        parts: By the bits of a storage, of those that occur.
    """

    def __init__(
        self, batch: int, rules: HeadRules, dims: tuple[int, int], device: torch.device, reserved: int | None
    ) -> None:
        self.rules, self._dims, self._reserved = rules, dims, reserved
        self.counts: Int[np.ndarray, " batch"] = np.zeros(batch, np.int64)
        self.parts: dict[int, Part] = {}
        self._forget()
        self._take_parts(batch, device)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the pages by storage."""
        return {NAMES[bits]: part.pool.nbytes for bits, part in self.parts.items()}

    @property
    def pages(self) -> list[Tensor]:
        """All tensors of pages."""
        return [tensor for _, pool in self.parts.values() for tensor in pool.pages]

    def lengths(self, tokens: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
        """Cold tokens of a stored row when sequences have come to so many tokens."""
        return np.maximum(self.counts, self._target(tokens)) * self.rules.page_size

    def has_room(self, tokens: Int[np.ndarray, " batch"]) -> bool:
        """Whether there are pages for all that is cold when sequences have come to so many tokens."""
        return not self.parts or all(part.rows.has_room(self.lengths(tokens)) for part in self.parts.values())

    def make_room(self, tokens: Int[np.ndarray, " batch"]) -> None:
        """Reserves those pages."""
        if self._reserved is not None:
            tokens = np.full(len(self.counts), self._reserved)
        for rows, pool in self.parts.values():
            if self._reserved is not None:
                pool.grow(self._whole(rows))
            pool.make_room(rows, self.lengths(tokens))

    def advance(self, tokens: Int[np.ndarray, " batch"], elsewhere: bool = False) -> None:
        """Counts what has grown cold when sequences came to so many tokens, if elsewhere by other counts."""
        if not self.parts:
            return
        lengths, known = self.lengths(tokens), self._known is self.counts
        if (lengths != self.counts * self.rules.page_size).any():
            self._count(lengths // self.rules.page_size)
        self._known = self.counts if known and not elsewhere else None

    def missing_after(self, tokens: Int[np.ndarray, " batch"]) -> int:
        """By how many tokens cuts to so many would reach into what is cold; 0 if none does."""
        inside = (self.counts > 0) & (tokens > self.rules.page_size)
        lost = (self.counts + 1) * self.rules.page_size - tokens
        return int(np.where(inside, lost, 0).max(initial=0)) if self.parts else 0

    def cut(self, tokens: Int[np.ndarray, " batch"]) -> None:
        """Cuts sequences back to so many tokens; what is cold stays so, unless the first page alone is left."""
        if self.parts:
            self._count(np.where(tokens <= self.rules.page_size, 0, self.counts))
            for rows, _ in self.parts.values():
                rows.cut(self.counts * self.rules.page_size)

    def select(self, index: Int[np.ndarray, " selected"]) -> None:
        """Makes sequence i what sequence `index[i]` was."""
        self.counts = self.counts[index]
        for rows, _ in self.parts.values():
            rows.select(index)

    def change_rules(self, rules: HeadRules, tokens: Int[np.ndarray, " batch"], device: torch.device) -> None:
        """Takes other rules: rows whose storage changes lose their pages, and the caller writes them anew."""
        if not self.parts:
            self.counts = np.zeros_like(self.counts)
        had, self.rules = bool(self.parts), rules
        self._take_parts(len(tokens), device)
        if self.parts and not had:
            self._count(self.lengths(tokens) // rules.page_size)

    def clear(self) -> None:
        """Lets the pages of empty rows hold zeros."""
        for _, pool in self.parts.values():
            for part in pool.pages:
                part.zero_()

    def fork(self) -> ColdRows:
        """Another holder of the same pages; if they are reserved, with its own."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), parts={})
        other._forget()
        for bits, (rows, pool) in self.parts.items():
            mine = Part(rows.fork(), pool if self._reserved is None else pool.clone())
            mine.pool.hold(mine.rows)
            other.parts[bits] = mine
        return other

    def part(self) -> ColdRows:
        """A copy with the pages of its own rows alone, held by nobody: what a pickle takes."""
        other = object.__new__(type(self))
        found = {bits: pool.part(rows) for bits, (rows, pool) in self.parts.items()}
        vars(other).update(vars(self), parts={bits: Part(rows, pool) for bits, (pool, rows) in found.items()})
        other._forget()
        return other

    def hold(self, lock: Any) -> None:
        """Lets the pools count the rows of a copy, under a lock."""
        for rows, pool in self.parts.values():
            pool.hold(rows)
        self.under(lock)

    def under(self, lock: Any) -> None:
        """Lets the pools be used under the lock of the hot pages' pool."""
        for _, pool in self.parts.values():
            pool.lock = lock

    def collect(self) -> None:
        """Takes back the pages of rows that have died."""
        for _, pool in self.parts.values():
            pool.collect()

    def shrink(self) -> None:
        """Gives free pages back to the device."""
        for _, pool in self.parts.values():
            pool.shrink()

    def to(self, device: torch.device) -> None:
        """Moves the pages."""
        for _, pool in self.parts.values():
            if pool.pages.codes.device != device:
                pool.to(device)

    # What kernels read

    def tensors(self, sequences: slice = slice(None)) -> Cold | None:
        """The cold pages of some sequences for kernels, as `refresh` left them; `None` where no head is stored."""
        if not self.parts:
            return None
        int8, int4 = (None if part is None else part.pool.pages for part in map(self.parts.get, (8, 4)))
        return Cold(int8, int4, self._table[sequences], self._counts[sequences])

    def refresh(self, device: torch.device) -> None:
        """Brings what has changed on the host to the device."""
        if not self.parts:
            return
        version = tuple(rows.version for rows, _ in self.parts.values())
        if self._table.device != device or version != self._version:
            tables = [rows.table for rows, _ in self.parts.values()]
            columns = max(x.shape[2] for x in tables)
            wide = [np.pad(x, ((0, 0), (0, 0), (0, columns - x.shape[2])), constant_values=-1) for x in tables]
            self._table, self._version = put(np.maximum.reduce(wide).clip(0), self._table, device), version
        if self._counts.device != device or self._known is not self.counts:
            stored = np.array(self.rules.storage) > 0
            self._counts = put((self.counts[:, None] * stored).astype(np.int32), self._counts, device)
            self._known = self.counts

    def read(
        self, sequence: int, heads: _Places, positions: _Places
    ) -> Iterator[tuple[Bool[np.ndarray, " kept"], Float[Tensor, "cold key_dim"], Float[Tensor, "cold value_dim"]]]:
        """Of tokens of one sequence those that are cold: which they are, and their keys and values in float32."""
        size, bits = self.rules.page_size, np.array(self.rules.storage or (0,) * self.rules.heads)
        inside = (positions >= size) & (positions < (self.counts[sequence] + 1) * size)
        for kind, (rows, pool) in self.parts.items():
            mine = inside & (bits[heads] == kind)
            if not mine.any():
                continue
            ids = rows.table[sequence, heads[mine], positions[mine] // size - 1]
            ids, which = np.unique(ids, return_inverse=True)
            device = pool.pages.codes.device
            where = which * size + positions[mine] % size
            ids, where = (staged(x.astype(np.int64), device).to(device) for x in (ids, where))
            codes, scales = (x.index_select(0, ids) for x in pool.pages)
            pages = dequantise_page(codes, scales, kind, size, self._dims)
            keys, values = (x.flatten(0, 1).index_select(0, where) for x in pages)
            yield mine, keys, values

    def write(
        self,
        sequence: int,
        head: int,
        keys: Float[Tensor, "tokens key_dim"],
        values: Float[Tensor, "tokens value_dim"],
    ) -> None:
        """Quantises the tokens of a stored row that are cold, given all that it holds from its first token on."""
        count, size, kind = int(self.counts[sequence]), self.rules.page_size, self.rules.storage[head]
        if not count:
            return
        rows, pool = self.parts[kind]
        device = pool.pages.codes.device
        where = torch.from_numpy(rows.table[sequence, head, :count].astype(np.int64)).to(device)
        full, beside = (x[size : (count + 1) * size].view(count, size, -1) for x in (keys, values))
        for page, new in zip(pool.pages, quantise_page(full, beside, kind), strict=True):
            page.index_copy_(0, where, new)

    def _count(self, counts: Int[np.ndarray, " batch"]) -> None:
        self.counts = counts
        for rows, _ in self.parts.values():
            rows.lengths = counts * self.rules.page_size

    def _target(self, tokens: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
        return ((tokens - self.rules.hot) // self.rules.page_size - 1).clip(0)

    def _take_parts(self, batch: int, device: torch.device) -> None:
        """Keeps the parts that the rules still have, and makes those that are new."""
        old, self.parts = self.parts, {}
        self._version, self._known = (), None
        for bits, heads in self.rules.stored_groups:
            rules = _rules(self.rules, heads)
            if bits in old:
                rows, _ = self.parts[bits] = old[bits]
                changed = [h for h in range(rules.heads) if rows.rules.ring[h] != rules.ring[h]]
                if changed:
                    rows.change_rules(rules, changed)
                continue
            rows = Rows(batch, rules)
            rows.lengths = self.counts * rules.page_size
            pages = None if self._reserved is None else self._whole(rows)
            pool = ColdPool(bits, rules.page_size, self._dims, device, pages)
            pool.hold(rows)
            self.parts[bits] = Part(rows, pool)

    def _whole(self, rows: Rows) -> int:
        """Pages of everything that is reserved."""
        tokens = np.full(rows.batch, self._reserved)
        return int(rows.pages_needed(self._target(tokens) * self.rules.page_size).sum())

    def _forget(self) -> None:
        """Forgets what is on the device."""
        self._table = torch.empty(0, 0, 0, dtype=torch.int32)
        self._counts = torch.empty(0, 0, dtype=torch.int32)
        self._version: tuple[int, ...] = ()
        self._known: Int[np.ndarray, " batch"] | None = None  # whose counts are on the device


def _rules(rules: HeadRules, heads: tuple[int, ...]) -> HeadRules:
    """Rules under which these heads keep everything and the others nothing."""
    ring = tuple(UNBOUNDED if h in heads else 0 for h in range(rules.heads))
    return HeadRules(tuple(r or 1 for r in ring), (0,) * rules.heads, ring, rules.page_size)
