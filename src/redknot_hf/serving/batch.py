"""A step of decoding for all seats: tables and lengths on the devices of layers, and on one with graphs a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from redknot_hf.attention.devices import input_device
from redknot_hf.cache.pool import staged
from redknot_hf.cache.rows import Rows

from .capturing import CapturedReading, CapturedStep, Numbers
from .memory import SeatMemory
from .sampling import Said
from .scheduler import Sequence
from .stepping import Batch, ColdCounts
from .tables import Tables

# Sequences whose last tokens of a prompt are read together.
READINGS = (1, 8)
# Batches for which steps are captured; a step of fewer seats runs in the next one, whose other seats are not real.
GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Seats:
    """What kernels read of the sequences that decode, one a seat, and the step that gives each a token.

    The layers of a model may be on several devices: tables are where their layers are.

    Attributes:
        device: Where the model takes tokens, and where they are chosen.
        numbers: What is known of each seat; cold pages are as many in all layers.
        captures: Whether steps are captured.
        graphs: Captured steps, by the number of seats.
        readings: Captured passes over ends of prompts, by the number of these.

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
        self.tables = Tables(self._layers, seats, -(-longest // memory.page_size))
        with torch.inference_mode(False):
            self.numbers = Numbers.of(seats, self.device)
        self._who: list[_Seated | None] = [None] * seats
        capture = capture and self.device.type == "cuda" and [*self._layers] == [self.device]
        capture = capture and first.kernels.captured is not None
        self.captures = capture and memory.ranks.captures
        self.compiled = compiled
        self.graphs: dict[int, CapturedStep] = {}
        self.replays = 0
        # Those that decoded last, and their seats.
        self._sitting: tuple[list[Sequence], list[int | None]] = [], []
        self._at = torch.zeros(0, dtype=torch.long, device=self.device)
        self._graph: CapturedStep | None = None
        self.readings: dict[int, CapturedReading] = {}
        self._cold_counts: dict[tuple[torch.device, int], ColdCounts] = {}

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
        self.memory.moved.discard(sequence)
        who = self._who[seat]
        new = who is None or who.sequence is not sequence or who.held is not sequence.held
        rows = self._rows(sequence) if who is None or new else who.rows
        version = sum(x.page_table.version for x in rows)
        if who is None or new or version != who.version:
            self._who[seat] = _Seated(sequence, sequence.held, rows, version)
            self.tables.put(sequence, seat)
        if new or first is not None:
            numbers = self.numbers
            numbers.lengths[seat].fill_(sequence.done)
            numbers.cold[seat].fill_(self._cold_pages(sequence))
            if first is None:
                numbers.last[seat].fill_(sequence.tokens[-1])
            else:
                numbers.last[seat : seat + 1].copy_(first)

    def forget(self, seat: int) -> None:
        """Whoever takes the seat next is new to it."""
        self._who[seat] = None

    def close(self) -> None:
        """Lets captured steps go, which hold pages and what ranks exchange, and the tables: there is no further step.

        A communicator waits for all graphs that have captured it, so those of ranks must not outlive the engine.
        """
        for graph in (*self.graphs.values(), *self.readings.values()):
            graph.close()
        self.graphs.clear()
        self.readings.clear()
        self._graph, self._sitting = None, ([], [])
        self._who = [None] * len(self._who)
        self.tables.flat.clear()

    def decode(self, sequences: list[Sequence]) -> Said:
        """Runs the model on the next token of each sequence, which its rows take; the host counts it as done.

        Each reads the likeliest token next, unless another is chosen.
        """
        with self._for_decoding():
            self._sit(sequences)
            said = self._replay() if self.captures else self._run()
        for sequence in sequences:
            sequence.done += 1
        return said

    def _sit(self, sequences: list[Sequence]) -> None:
        """Brings to the device what has changed since the last step, which as a rule is nothing."""
        sitting = sequences, [x.seat for x in sequences]
        if self._sitting == sitting:
            for sequence in self.memory.moved.intersection(sequences):
                self.place(sequence, None)
            return
        for sequence in sequences:
            self.place(sequence, None)
        self._sitting, self._at = (list(sequences), sitting[1]), self._seats(sequences)
        self.numbers.real.zero_()
        if self.captures:
            most, last = len(self._who), int(max(x for x in sitting[1] if x is not None))
            size = most if self.compiled else min(next((n for n in GRAPHS if n > last), most), most)
            self._graph = self._captured(size)
        self.numbers.real.index_fill_(0, self._at, True)

    def read(self, parts: list[tuple[Sequence, int]]) -> Iterator[tuple[list[Sequence], Said]]:
        """Reads the next tokens of several sequences together, up to a page of each; the host counts them as done.

        Yields:
            Some of the sequences as they are read, and what the model says of their next tokens.
        """
        size = self.memory.page_size
        for some in _alike(parts):
            longest = size if self.captures else max(count for _, count in some)
            rows = next(n for n in READINGS if n >= len(some)) if self.captures else len(some)
            asked = np.full((rows, 1 + longest), -1)
            asked[:, 0] = 0
            for row, (sequence, count) in zip(asked, some, strict=False):
                self.place(sequence, None)
                row[0], row[-count:] = sequence.seat, sequence.tokens[sequence.done : sequence.done + count]
            with self._for_decoding() if self.captures else nullcontext():
                logits = self._read(staged(asked, self.device))[: len(some)]
            for sequence, count in some:
                sequence.done += count
            yield [x for x, _ in some], Said(logits)

    def _read(self, asked: Int[Tensor, "rows seat_and_tokens"]) -> Float[Tensor, "rows words"]:
        if not self.captures:
            return self._forward_of(asked.to(self.device, non_blocking=True))
        if len(asked) not in self.readings:
            self.readings[len(asked)] = CapturedReading(self._forward_of, len(asked), asked.shape[1], self.device)
        return self.readings[len(asked)].replay(asked)

    def choose(self, sequences: list[Sequence], chosen: Int[Tensor, " sequences"]) -> None:
        """Lets the next step read what was chosen."""
        self.numbers.last.index_copy_(0, self._seats(sequences), chosen)

    def _seats(self, sequences: list[Sequence]) -> Int[Tensor, " sequences"]:
        seats = np.array([x.seat for x in sequences], np.int64)
        return staged(seats, self.device).to(self.device, non_blocking=True)

    def _for_decoding(self) -> AbstractContextManager[Any]:
        optimized = getattr(self.model, "_optimize_model_for_decode", None)
        return nullcontext() if optimized is None else optimized()

    def _run(self) -> Said:
        last = self.numbers.last
        asked = torch.stack([self._at, last.index_select(0, self._at)], 1)
        said = Said(self._forward_of(asked))
        last.index_copy_(0, self._at, said.likeliest)
        return said

    def _forward_of(self, asked: Int[Tensor, "rows seat_and_tokens"]) -> Float[Tensor, "rows words"]:
        """Runs the model on tokens of some seats, which their rows take; those before the first of a row are -1."""
        at, ids, (_, all_lengths, all_cold, _) = asked[:, 0], asked[:, 1:], self.numbers
        real = ids >= 0
        here = real[:, -1]
        lengths, cold = (x.index_select(0, at) * here for x in (all_lengths, all_cold))
        hot, stored, frozen, counts = {}, {}, {}, []
        for device, layers in self._layers.items():
            mine = self.tables.of(device, self.tables.flat[device].index_select(0, at.to(device)))
            hot, stored = hot | mine[0], stored | mine[1]
            known = F.pad(lengths, (0, 1)).to(device).repeat(len(layers), 1)
            counts += known
            if (device, len(at)) not in self._cold_counts:
                with torch.inference_mode(False):
                    self._cold_counts[device, len(at)] = ColdCounts(layers, len(at), device)
            grown = self._cold_counts[device, len(at)]
            grown.set(cold.to(device))
            frozen |= grown.of
        batch = Batch(self.memory, hot, stored, counts, frozen, None if ids.shape[1] == 1 else real)
        positions = (lengths[:, None] + real.cumsum(1) - 1).clamp(min=0)
        logits = self._forward(ids.clamp(min=0), positions, batch, self.model)
        self.memory.count(all_lengths.index_add_(0, at, real.sum(1, dtype=torch.int32)), all_cold)
        return logits

    def _forward(
        self, ids: Tensor, positions: Tensor, batch: Batch, model: Callable[..., Any]
    ) -> Float[Tensor, "sequences words"]:
        mask = torch.ones(len(ids), 1, 1, 1, dtype=torch.bool, device=self.device)
        out = model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, logits_to_keep=1,
            **{self.memory.name: batch},
        )  # fmt: skip
        return out.logits[:, -1].to(self.device)

    def _captured(self, size: int) -> CapturedStep:
        if size not in self.graphs:
            tables = self.tables.of(self.device, self.tables.flat[self.device][:size])
            numbers = Numbers(*(x[:size] for x in self.numbers))
            self.graphs[size] = CapturedStep(self.memory, tables, numbers, self._forward, self.compiled)
        return self.graphs[size]

    def _replay(self) -> Said:
        (sequences, seats), graph = self._sitting, self._graph
        assert graph is not None
        graph.replay()
        self.replays += 1
        count = len(sequences)
        if seats == list(range(count)):
            return Said(graph.logits[:count], None, graph.likeliest[:count])
        return Said(graph.logits, self._at, graph.likeliest.index_select(0, self._at))


class _Seated(NamedTuple):
    """Who sits in a seat, what it held and of which version its tables were when they were brought there."""

    sequence: Sequence
    held: Any
    rows: list[Rows]
    version: int


def _alike(parts: list[tuple[Sequence, int]]) -> Iterator[list[tuple[Sequence, int]]]:
    """A few sequences together, of which about as much is read."""
    ordered, most = sorted(parts, key=lambda x: x[1]), READINGS[-1]
    for first in range(0, len(ordered), most):
        yield ordered[first : first + most]
