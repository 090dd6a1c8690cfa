"""A step of decoding for all seats: their tables and lengths on the device, and where it has graphs, one replay."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from redknot_hf.cache.handle import RedKnotHandle
from redknot_hf.cache.pool import staged
from redknot_hf.cache.step import Output, Query, Step
from redknot_hf.cache.storage import Storage

from .memory import SeatMemory
from .scheduler import Sequence

# Batches for which steps are captured; a step of fewer seats runs in the next one, whose other seats are not real.
GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Seats:
    """What kernels read of the sequences that decode, one a seat, and the step that gives each a token.

    Attributes:
        last: The token of each seat that is read next.
        lengths: Tokens that the rows of each seat hold.
        captures: Whether steps are captured.

    Args:
        memory: Whose pages are read.
        seats: How many.
        longest: Tokens of a sequence at most.
        capture: Whether to capture steps; only on a device and with kernels that can.
    """

    def __init__(self, memory: SeatMemory, seats: int, longest: int, capture: bool) -> None:
        self.memory, self.model = memory, memory.model
        first = next(iter(memory.layers.values()))
        self.device = first.device
        columns = -(-longest // memory.page_size)
        shapes = {i: (x.rows.rules.heads, _columns(x, columns)) for i, x in memory.layers.items()}
        self._width = sum(heads * columns for heads, columns in shapes.values())
        with torch.inference_mode(False):
            flat = torch.zeros(seats, self._width, dtype=torch.int32, device=self.device)
            self.last = torch.zeros(seats, dtype=torch.long, device=self.device)
            self.lengths = torch.zeros(seats, dtype=torch.int32, device=self.device)
        self._flat, self._tables, self._places, at = flat, {}, {}, 0
        for i, (heads, width) in shapes.items():
            self._places[i] = at, heads, width
            self._tables[i] = flat[:, at : at + heads * width].view(seats, heads, width)
            at += heads * width
        self._who: list[tuple[Sequence, int, int] | None] = [None] * seats
        self.captures = capture and self.device.type == "cuda" and first.kernels.captured is not None
        self._graphs: dict[int, _Graph] = {}
        self.replays = 0

    def place(self, sequence: Sequence, first: Int[Tensor, " 1"] | None) -> None:
        """Brings a sequence's table to its seat where it has changed, and its length and next token where it is new.

        Args:
            sequence: It has a seat.
            first: Its next token, if only the device knows it.
        """
        seat = sequence.seat
        assert seat is not None
        version = sum(sequence.held.layers[i].storage.rows.version for i in self.memory.kinds)
        who = self._who[seat]
        if who is None or who[0] is not sequence or who[1] != version or who[2] != id(sequence.held):
            row = np.zeros(self._width, np.int32)
            for i, (at, heads, width) in self._places.items():
                table = sequence.held.layers[i].storage.rows.table[0]
                row[at : at + heads * width].reshape(heads, width)[:, : table.shape[1]] = np.maximum(table, 0)
            self._flat[seat].copy_(staged(row, self.device), non_blocking=True)
            if who is None or who[0] is not sequence or who[2] != id(sequence.held):
                self.lengths[seat].fill_(sequence.done)
                if first is None:
                    self.last[seat].fill_(sequence.tokens[-1])
        self._who[seat] = sequence, version, id(sequence.held)
        if first is not None:
            self.last[seat : seat + 1].copy_(first)
            self.lengths[seat].fill_(sequence.done)

    def forget(self, seat: int) -> None:
        """Whoever takes the seat next is new to it."""
        self._who[seat] = None

    def decode(self, sequences: list[Sequence]) -> Float[Tensor, "sequences words"]:
        """Runs the model on the next token of each sequence, which its rows take; the host counts it as done."""
        seats = [x.seat for x in sequences if x.seat is not None]
        at = staged(np.array(seats, np.int64), self.device).to(self.device, non_blocking=True)
        with self._for_decoding():
            if self.captures:
                most = len(self._who)
                logits = self._replay(min(next((n for n in GRAPHS if n > max(seats)), most), most), at)
            else:
                logits = self._run(at)
        self.lengths.index_add_(0, at, torch.ones_like(at, dtype=torch.int32))
        for sequence in sequences:
            sequence.done += 1
        return logits

    def choose(self, sequences: list[Sequence], chosen: Int[Tensor, " sequences"]) -> None:
        """Lets the next step read what was chosen."""
        seats = np.array([x.seat for x in sequences], np.int64)
        at = staged(seats, self.device).to(self.device, non_blocking=True)
        self.last.index_copy_(0, at, chosen)

    def _for_decoding(self) -> AbstractContextManager[Any]:
        optimized = getattr(self.model, "_optimize_model_for_decode", None)
        return nullcontext() if optimized is None else optimized()

    def _run(self, at: Int[Tensor, " sequences"]) -> Float[Tensor, "sequences words"]:
        lengths = self.lengths.index_select(0, at)
        tables = {i: table.index_select(0, at) for i, table in self._tables.items()}
        counts = torch.cat([lengths, lengths.new_zeros(1)]).repeat(len(tables), 1)
        batch = _Batch(self.memory, tables, dict(zip(tables, counts, strict=True)), None)
        ids = self.last.index_select(0, at)[:, None]
        return self._forward(ids, lengths.long()[:, None], batch)

    def _forward(self, ids: Tensor, positions: Tensor, batch: _Batch) -> Float[Tensor, "sequences words"]:
        mask = torch.ones(len(ids), 1, 1, 1, dtype=torch.bool, device=self.device)
        out = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, **{self.memory.name: batch}
        )
        return out.logits[:, -1]

    def _replay(self, size: int, at: Int[Tensor, " sequences"]) -> Float[Tensor, "sequences words"]:
        if size not in self._graphs:
            self._graphs[size] = _Graph(self, size)
        graph = self._graphs[size]
        graph.real.zero_().index_fill_(0, at, True)
        graph.ids.copy_(self.last[:size, None])
        torch.mul(self.lengths[:size], graph.real[:, 0], out=graph.lengths)
        graph.positions.copy_(graph.lengths[:, None])
        graph.counts[:, :size] = graph.lengths
        graph.replay()
        self.replays += 1
        return graph.logits.index_select(0, at)


class _Graph:
    """A captured step of a batch of one size: what it reads and writes stays where it is."""

    def __init__(self, seats: Seats, size: int) -> None:
        device = seats.device
        with torch.inference_mode(False):
            self.ids = torch.zeros(size, 1, dtype=torch.long, device=device)
            self.positions = torch.zeros(size, 1, dtype=torch.long, device=device)
            self.lengths = torch.zeros(size, dtype=torch.int32, device=device)
            self.real = torch.zeros(size, 1, dtype=torch.bool, device=device)
            self.counts = torch.zeros(len(seats._tables), size + 1, dtype=torch.int32, device=device)
        tables = {i: table[:size] for i, table in seats._tables.items()}
        batch = _Batch(seats.memory, tables, dict(zip(tables, self.counts, strict=True)), self.real)
        run = lambda: seats._forward(self.ids, self.positions, batch.renewed())  # noqa: E731
        run()  # no seat is real, so this changes nothing but compiles what it calls
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.logits = run()

    def replay(self) -> None:
        self._graph.replay()


class _Batch(Cache):
    """What the model takes for its cache in a step of decoding: it hands keys on to the rows of the seats."""

    def __init__(
        self,
        memory: SeatMemory,
        tables: dict[int, Int[Tensor, "seats heads columns"]],
        counts: dict[int, Int[Tensor, " seats_and_one"]],
        real: Bool[Tensor, "seats 1"] | None,
    ) -> None:
        self._made_of = memory, tables, counts, real
        layers = [
            _BatchLayer(memory.layers[i], tables[i], counts[i], real) if i in tables else layer
            for i, layer in enumerate(memory.root.layers)
        ]
        super().__init__(layers=layers)

    def renewed(self) -> _Batch:
        """Another for the next step."""
        return _Batch(*self._made_of)


class _BatchLayer(CacheLayerMixin):
    """A layer of seats. Every one of them has a single new token, so there is nothing to say about masks."""

    is_sliding = False

    def __init__(
        self,
        storage: Storage,
        table: Int[Tensor, "seats heads columns"],
        counts: Int[Tensor, " seats_and_one"],
        real: Bool[Tensor, "seats 1"] | None,
    ) -> None:
        super().__init__()
        self.storage, self.table, self.counts, self.real = storage, table, counts, real
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pools are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Handles whose step is attended by this layer."""
        step = Step(self.storage, key_states, value_states, 1, 0, attend=self.attend)
        return RedKnotHandle.wrap(key_states, step), RedKnotHandle.wrap(value_states, step)

    def attend(self, step: Step, query: Query, mask: Any, options: dict[str, Any]) -> Output:
        """Writes the tokens to the rows of their seats, and attends them; layers that share keys attend alone."""
        storage = self.storage
        rules, pages = storage.rows.rules, storage.pool.pages
        if step.written:
            return storage.kernels.decode(query, pages, self.table, self.counts[:-1], rules, **options)
        step.written = True
        return storage.kernels.step(
            query, pages, step.key, step.value, self.table, self.counts, self.real, rules, **options
        )

    def get_seq_length(self) -> int:
        """No mask describes the past."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The new token alone."""
        return query_length, 0

    def get_max_length(self) -> int:
        """None."""
        return -1


def _columns(storage: Storage, columns: int) -> int:
    rules = storage.rows.rules
    return columns if rules.global_heads else min(columns, max(rules.max_pages))
