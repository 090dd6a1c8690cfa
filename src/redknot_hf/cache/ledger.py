"""Bookkeeping of one layer: its rows, the pages these lie in, who else holds those, and what kernels read of them."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from redknot_kernels import HeadRules, Kernels
from torch import Tensor

from .cold import ColdPool, ColdRows, Part
from .history import SlotHistory, Slots
from .mirror import Mirror
from .pool import PagePool
from .rows import Rows

Lengths = Int[np.ndarray, " batch"]
Mine = TypeVar("Mine", bound="Ledger")


class Held(NamedTuple):
    """Rows in a pool.

    Attributes:
        rows: Which pages they list.
        pool: The pages.
        lengths: That their sequences are to come to, as these rows count.
    """

    rows: Rows
    pool: PagePool
    lengths: Lengths


class Ledger:
    """What a `Storage` keeps count of, and whatever moves or frees pages without writing tokens.

    Forks share pages until one side writes (copy-on-write), and may be used from other threads: whatever touches rows
    or pages holds the pool's lock.

    Attributes:
        rows: The page table and the lengths, in real tokens.
        history: The slots, padding included, and which of them were padding.
        pool: The pages, which forks may hold too.
        cold: What stored rows keep beside those.
        mirror: Rows as kernels read them.
        kernels: They write and attend.
        device: Where steps come from; the pages may be elsewhere in between.
        reserved: Slots for which everything is reserved (`max_cache_len`), or `None`. With it steps may be captured:
            then the device counts ahead, and `catch_up` asks it.
        page_size: Tokens of a page.
    """

    def __init__(
        self,
        batch: int,
        rules: HeadRules,
        dims: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        reserved: int | None,
    ) -> None:
        self.kernels, self.device, self.reserved, self.page_size = kernels, device, reserved, rules.page_size
        self.rows, self.history, self.mirror = Rows(batch, rules), SlotHistory(), Mirror()
        self.pool = PagePool(self.page_size, dims, dtype, device, None if reserved is None else self._whole())
        self.pool.hold(self.rows)
        self.cold = ColdRows(batch, rules, dims, device, reserved)
        self.cold.under(self.pool.lock)
        self._settle()

    @property
    def nbytes(self) -> int:
        """Bytes of the pages; they may be shared with a fork."""
        return sum(self.nbytes_by_storage.values())

    @property
    def nbytes_by_storage(self) -> dict[str, int]:
        """Bytes of the pages in the model's dtype (`"model"`), and of the cold ones of each storage."""
        with self.pool.lock:
            self._collect()
            return {"model": self.pool.nbytes, **self.cold.nbytes}

    @property
    def compileable(self) -> bool:
        """Whether steps can be captured: everything is reserved, and the kernels read lengths on the device."""
        return self.reserved is not None and self.kernels.captured is not None

    def captures(self, tokens: int) -> bool:
        """Whether a step of so many tokens can be captured now."""
        return self.compileable and tokens <= self.page_size

    def left_align(self) -> None:
        """Lets slots be the real tokens, padded on the left where sequences differ in length, as prompts are."""
        lengths = self.rows.lengths
        longest = int(lengths.max(initial=0))
        level = bool((lengths == longest).all())
        self.align(
            longest if level else torch.from_numpy(np.arange(longest) >= longest - lengths[:, None]).to(self.device)
        )

    def align(self, slots: Slots) -> None:
        """Lets these be the slots: a number of them, or flags of which are real, as many as the rows have tokens."""
        self.history = SlotHistory()
        self.history.add(slots)
        with self.pool.lock:
            self._mirrored()  # a captured step may be next

    def catch_up(self) -> None:
        """Takes over what captured steps have counted on the device; waits for it.

        Raises:
            RuntimeError: A captured step had padding for some sequences only, and the host does not know where.
        """
        if not self.compileable:
            return
        counts = self.mirror.read_counts()
        more, slots = counts[:-1] - self.rows.lengths, int(counts[-1]) - self.history.slots
        if slots == 0:
            return
        if (more != slots).any():
            raise RuntimeError(
                "a compiled step had padding in some sequences, and only the device knows where: pass all of a batch "
                "real tokens in compiled steps, or call cache.reset()."
            )
        self._count(self.rows.lengths + more, slots)
        self.mirror.advanced(self.rows, self.history.slots)

    def missing_after_cut(self, slots: int) -> int:
        """Tokens that a next query would miss if the last slots were taken back, or that are cold; 0 if none."""
        lengths = self._lengths_after_cut(slots)
        return max(self.rows.missing_after(lengths), self.cold.missing_after(lengths))

    def cut(self, slots: int) -> None:
        """Takes the last slots back, and gives pages that nobody holds any more to the device."""
        lengths = self._lengths_after_cut(slots)
        with self.pool.lock:
            if slots:
                self.history.drop_last(slots)
                self.rows.cut(lengths)
                self.cold.cut(lengths)
            self._shrink()
            self._settle()

    def clear(self) -> None:
        """Drops all tokens; what was reserved stays, and holds zeros."""
        with self.pool.lock:
            self.rows.cut(np.zeros_like(self.rows.lengths))
            self.cold.cut(self.rows.lengths)
            self.history = SlotHistory()
            self._settle()
            for part in self.pool.pages:
                part.zero_()  # what was there need not stay readable
            self.cold.clear()

    def select(self, index: Int[Tensor, " selected"], shrink: bool = False) -> None:
        """Makes sequence i what sequence `index[i]` was, by the page table; `shrink` gives memory of others back."""
        self.catch_up()
        self.history.select(index)
        if shrink:
            self.history.forget_padding()
        with self.pool.lock:
            self.rows.select(index.numpy())
            self.cold.select(index.numpy())
            self._settle()
            if shrink:
                self._shrink()

    def to(self, device: torch.device) -> None:
        """Moves the pages, until the next step brings them back."""
        with self.pool.lock:
            if self.pool.pages.device != device:
                self.pool.to(device)
            self.cold.to(device)

    def fork(self: Mine) -> Mine:
        """Another holder of the same pages, copied when either side writes to them; if reserved, with its own."""
        self.catch_up()
        other = object.__new__(type(self))
        vars(other).update(vars(self), history=self.history.fork(), mirror=Mirror())
        with self.pool.lock:
            other.rows = self.rows.fork()
            other.pool = self.pool if self.reserved is None else self.pool.clone()
            other.pool.hold(other.rows)
            other.cold = self.cold.fork()
            other.cold.under(other.pool.lock)
        other._settle()
        return other

    def settle(self, pages: int, columns: int) -> None:
        """Gives empty rows pools of a fixed size, which all forks will share: so many pages, and cold ones a row."""
        dims = (self.pool.pages.keys.shape[-1], self.pool.pages.values.shape[-1])
        self.pool = PagePool(self.page_size, dims, self.pool.pages.keys.dtype, self.device, pages)
        self.pool.hold(self.rows)
        for bits, (rows, old) in self.cold.parts.items():
            most = columns * len(rows.rules.global_heads)
            pool = ColdPool(bits, self.page_size, dims, old.pages.codes.device, most)
            pool.hold(rows)
            self.cold.parts[bits] = Part(rows, pool)
        self.cold.under(self.pool.lock)

    def let_go(self) -> None:
        """Takes all pages from pools of a fixed size, from forks too, which can do nothing with theirs any more."""
        with self.pool.lock:
            for _, pool, _ in self.held(0):
                pool.empty()
        self.settle(0, 0)

    def told(self, tokens: int) -> None:
        """Counts tokens of its one sequence that were written by tables and counts which are not the mirror's."""
        with self.pool.lock:
            self.rows.advance(np.array([tokens]))
            self.cold.advance(self.rows.lengths, elsewhere=True)
            self.history.add(tokens)

    def held(self, tokens: int) -> list[Held]:
        """By pool, what its rows hold, and what those of one sequence will when the page of so many tokens is full."""
        wanted = np.array([-(-tokens // self.page_size) * self.page_size])
        hot = Held(self.rows, self.pool, wanted)
        return [hot, *(Held(*part, self.cold.lengths(wanted)) for part in self.cold.parts.values())]

    def __getstate__(self) -> dict[str, Any]:
        """With the pages of its own rows only, whoever else holds pages of the pool."""
        self.catch_up()
        with self.pool.lock:
            pool, rows = self.pool.part(self.rows)
            cold = self.cold.part()
        return {**vars(self), "pool": pool, "rows": rows, "cold": cold}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.pool.hold(self.rows)
        self.cold.hold(self.pool.lock)
        self._settle()

    # The steps of the above; the lock is held

    def _make_room(self, lengths: Lengths) -> None:
        if self.reserved is not None:  # a captured step cannot ask for pages
            lengths = np.full(self.rows.batch, self.reserved)
            self.pool.grow(self._whole())
        self.pool.make_room(self.rows, lengths)
        self.cold.make_room(lengths)

    def _count(self, lengths: Lengths, slots: Slots) -> None:
        """Counts slots that kernels have written, when sequences have come to these lengths."""
        self.rows.lengths = lengths
        if self.cold.parts:
            self.cold.advance(lengths)
        self.history.add(slots)

    def _mirrored(self) -> None:
        device = self.pool.pages.device  # another holder may have moved it
        self.mirror.refresh(self.rows, self.history.slots, device)
        self.cold.refresh(device)

    def _lengths_after_cut(self, slots: int) -> Lengths:
        return self.rows.lengths - self.history.real_among_last(slots, self.rows.batch)

    def _whole(self) -> int:
        """Pages of everything that is reserved."""
        return int(self.rows.pages_needed(np.full(self.rows.batch, self.reserved)).sum())

    def _collect(self) -> None:
        self.pool.collect()
        self.cold.collect()

    def _shrink(self, settled: bool = False) -> None:
        """Gives free pages to the device; with `settled` also those of reserved pools that no row needs."""
        self._collect()
        self.pool.shrink()
        self.cold.shrink()
        if settled and self.reserved is not None:
            for pool in (self.pool, *(part.pool for part in self.cold.parts.values())):
                pool.trim(0)

    def _settle(self) -> None:
        """Where slots are reserved: reserves them and brings them to the device, where captured steps will look."""
        if self.reserved is None:
            return
        self._make_room(self.rows.lengths)
        self._mirrored()
        for part in (*self.pool.pages, *self.cold.pages):
            torch._dynamo.mark_static_address(part, guard=False)
