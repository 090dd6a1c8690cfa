"""A step of decoding for all seats: tables and lengths on the devices of layers, and on one with graphs a replay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from redknot_hf.attention.devices import input_device
from redknot_hf.cache.pool import staged
from redknot_hf.cache.rows import Rows
from redknot_hf.cache.storage import Storage

from .capturing import CapturedStep
from .memory import SeatMemory
from .scheduler import Sequence
from .stepping import Batch, ColdCounts

# Batches for which steps are captured; a step of fewer seats runs in the next one, whose other seats are not real.
GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Seats:
    """What kernels read of the sequences that decode, one a seat, and the step that gives each a token.

    The layers of a model may be on several devices: tables are where their layers are.

    Attributes:
        device: Where the model takes tokens, and where they are chosen.
        last: The token of each seat that is read next.
        lengths: Tokens that the rows of each seat hold.
        cold: Cold pages that each stored row of a seat has, in all layers alike.
        captures: Whether steps are captured.
        graphs: Captured steps, by the number of seats.

    Args:
        memory: Whose pages are read.
        seats: How many.
        longest: Tokens of a sequence at most.
        capture: Whether to capture steps; only on a device and with kernels that can.
        compiled: Whether captured steps are compiled before, once for all seats.
    """

    def __init__(self, memory: SeatMemory, seats: int, longest: int, capture: bool, compiled: bool = False) -> None:
        self.memory, self.model = memory, memory.model
        first = next(iter(memory.layers.values()))
        self.device = input_device(self.model)
        self._layers = memory.places()
        self._lay_out(seats, -(-longest // memory.page_size))
        self._who: list[_Seated | None] = [None] * seats
        capture = capture and self.device.type == "cuda" and [*self._layers] == [self.device]
        capture = capture and first.kernels.captured is not None
        self.captures = capture and memory.ranks.captures
        self.compiled = compiled
        self.graphs: dict[int, CapturedStep] = {}
        self.replays = 0

    def _lay_out(self, seats: int, columns: int) -> None:
        """Makes the tables of a device's layers, hot and cold, in one tensor: a row of numbers a seat."""
        self._places: dict[tuple[int, bool], tuple[torch.device, int, int, int]] = {}
        self._flat: dict[torch.device, Int[Tensor, "seats width"]] = {}
        with torch.inference_mode(False):
            for device, layers in self._layers.items():
                at = 0
                for i, storage in layers.items():
                    rules = storage.rows.rules
                    for cold, wide in (
                        (False, _columns(storage, columns)),
                        (True, columns * bool(rules.stored_heads)),
                    ):
                        if wide:
                            self._places[i, cold] = device, at, rules.heads, wide
                            at += rules.heads * wide
                self._flat[device] = torch.zeros(seats, at, dtype=torch.int32, device=device)
            self.last = torch.zeros(seats, dtype=torch.long, device=self.device)
            self.lengths = torch.zeros(seats, dtype=torch.int32, device=self.device)
            self.cold = torch.zeros(seats, dtype=torch.int32, device=self.device)

    def _tables(self, sequence: Sequence) -> dict[torch.device, Int[np.ndarray, " width"]]:
        """The tables of a sequence, as they stand in a row of numbers, for each device."""
        found = {device: np.zeros(flat.shape[1], np.int32) for device, flat in self._flat.items()}
        for (i, cold), (device, at, heads, width) in self._places.items():
            storage = sequence.held.layers[i].storage
            for rows in [part.rows for part in storage.cold.parts.values()] if cold else [storage.rows]:
                table = rows.table[0, :, :width]
                row = found[device][at : at + heads * width].reshape(heads, width)
                row[:, : table.shape[1]] += np.maximum(table, 0)
        return found

    def _rows(self, sequence: Sequence) -> list[Rows]:
        """Rows whose versions tell of every change of its tables: of one layer of each kind, cold ones too."""
        return [x.rows for i in self.memory.kinds for x in sequence.held.layers[i].storage.held(0)]

    def _cold_pages(self, sequence: Sequence) -> int:
        """Cold pages of each stored row of a sequence."""
        held = [sequence.held.layers[i].storage.cold for i in self.memory.kinds]
        tokens = np.array([sequence.done])
        return max((int(x.lengths(tokens)[0]) // x.rules.page_size for x in held if x.parts), default=0)

    def place(self, sequence: Sequence, first: Int[Tensor, " 1"] | None) -> None:
        """Brings a sequence's table to its seat where it has changed, and its length and next token where it is new.

        Args:
            sequence: It has a seat.
            first: Its next token, if only the device knows it.
        """
        seat = sequence.seat
        assert seat is not None
        who = self._who[seat]
        new = who is None or who.sequence is not sequence or who.held is not sequence.held
        rows = self._rows(sequence) if who is None or new else who.rows
        version = sum(x.page_table.version for x in rows)
        if who is None or new or version != who.version:
            self._who[seat] = _Seated(sequence, sequence.held, rows, version)
            for device, row in self._tables(sequence).items():
                self._flat[device][seat].copy_(staged(row, device), non_blocking=True)
        if new:
            self.lengths[seat].fill_(sequence.done)
            self.cold[seat].fill_(self._cold_pages(sequence))
            if first is None:
                self.last[seat].fill_(sequence.tokens[-1])
        if first is not None:
            self.last[seat : seat + 1].copy_(first)
            self.lengths[seat].fill_(sequence.done)
            self.cold[seat].fill_(self._cold_pages(sequence))

    def forget(self, seat: int) -> None:
        """Whoever takes the seat next is new to it."""
        self._who[seat] = None

    def close(self) -> None:
        """Lets captured steps go, which hold pages and what ranks exchange, and the tables: there is no further step.

        A communicator waits for all graphs that have captured it, so those of ranks must not outlive the engine.
        """
        for graph in self.graphs.values():
            graph.close()
        self.graphs.clear()
        self._who = [None] * len(self._who)
        self._flat.clear()

    def decode(self, sequences: list[Sequence]) -> Float[Tensor, "sequences words"]:
        """Runs the model on the next token of each sequence, which its rows take; the host counts it as done."""
        seats = [x.seat for x in sequences if x.seat is not None]
        at = staged(np.array(seats, np.int64), self.device).to(self.device, non_blocking=True)
        with self._for_decoding():
            if self.captures:
                most = len(self._who)
                size = most if self.compiled else min(next((n for n in GRAPHS if n > max(seats)), most), most)
                logits = self._replay(size, at)
            else:
                logits = self._run(at)
        self.lengths.index_add_(0, at, torch.ones_like(at, dtype=torch.int32))
        if self.memory.stored is not None:  # what kernels have counted for these seats, in every layer
            grown: Any = self.memory.stored.cold_pages(self.lengths)
            torch.maximum(self.cold, grown.to(torch.int32), out=self.cold)
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

    def tables(
        self, device: torch.device, flat: Int[Tensor, "seats width"]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Of each layer on a device the tables of some seats, hot ones and cold ones, as views of their numbers."""
        found: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for (i, cold), (home, at, heads, width) in self._places.items():
            if home == device:
                found[cold][i] = flat[:, at : at + heads * width].unflatten(1, (heads, width))
        return found

    def _run(self, at: Int[Tensor, " sequences"]) -> Float[Tensor, "sequences words"]:
        lengths, cold = (x.index_select(0, at) for x in (self.lengths, self.cold))
        hot, stored, frozen, counts = {}, {}, {}, []
        for device, layers in self._layers.items():
            mine = self.tables(device, self._flat[device].index_select(0, at.to(device)))
            hot, stored = hot | mine[0], stored | mine[1]
            known = torch.cat([lengths, lengths.new_zeros(1)]).to(device).repeat(len(layers), 1)
            counts += known
            grown = ColdCounts(layers, len(at), device)
            grown.set(cold.to(device))
            frozen |= grown.of
        batch = Batch(self.memory, hot, stored, counts, frozen, None)
        ids = self.last.index_select(0, at)[:, None]
        return self._forward(ids, lengths.long()[:, None], batch, self.model)

    def _forward(
        self, ids: Tensor, positions: Tensor, batch: Batch, model: Callable[..., Any]
    ) -> Float[Tensor, "sequences words"]:
        mask = torch.ones(len(ids), 1, 1, 1, dtype=torch.bool, device=self.device)
        out = model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, **{self.memory.name: batch}
        )
        return out.logits[:, -1].to(self.device)

    def _replay(self, size: int, at: Int[Tensor, " sequences"]) -> Float[Tensor, "sequences words"]:
        if size not in self.graphs:
            tables = self.tables(self.device, self._flat[self.device][:size])
            self.graphs[size] = CapturedStep(self.memory, tables, size, self._forward, self.compiled)
        graph = self.graphs[size]
        graph.real.zero_().index_fill_(0, at, True)
        graph.ids.copy_(self.last[:size, None])
        torch.mul(self.lengths[:size], graph.real[:, 0], out=graph.lengths)
        graph.positions.copy_(graph.lengths[:, None])
        graph.counts[:, :size] = graph.lengths
        graph.cold.set(self.cold[:size] * graph.real[:, 0])
        graph.replay()
        self.replays += 1
        return graph.logits.index_select(0, at)


class _Seated(NamedTuple):
    """Who sits in a seat, what it held and of which version its tables were when they were brought there."""

    sequence: Sequence
    held: Any
    rows: list[Rows]
    version: int


def _columns(storage: Storage, columns: int) -> int:
    rules = storage.rows.rules
    return columns if rules.global_heads else min(columns, max(rules.max_pages))
