"""Segments on their way into a cache: one forward pass of all tokens to recompute, and stored ones put between them.

What is stored does not depend on what is recomputed, so no segment has to wait for the one before it to be read: the
model takes the boundaries of many segments at once, and in every layer they are attended piece by piece, each on the
rows as the pieces and the stored tokens before it have left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from redknot_kernels import Rotation
from torch import Tensor
from torch.profiler import record_function
from transformers import Cache

from .attention import attend_step
from .cache import RedKnotCache
from .handle import RedKnotHandle, Step
from .layer import RedKnotLayer
from .mask import PaddingMask
from .recording import CHUNK, padded, row_layers
from .rope import Relocation
from .segment import Segment
from .segments import SegmentRef, SegmentStore
from .splice import settle_slots, splice

# Tokens of one forward pass, those of all sequences together.
_PASS_TOKENS = 8192
# Bytes of stored segments that a pass may bring to the device beside the cache; a single segment may be more.
_PASS_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Reused:
    """How one segment came into a sequence of a cache.

    Attributes:
        ref: The segment.
        start: Position of its first token.
        boundary: First tokens that were recomputed.
        moved: The rest stands elsewhere than it was computed, so its keys were rotated.
    """

    ref: SegmentRef
    start: int
    boundary: int
    moved: bool


# One segment for each sequence of a batch, or none.
Column = Sequence[Reused | None]


def is_spliced(part: Reused | None) -> TypeGuard[Reused]:
    """Whether some of a segment is taken as it is stored."""
    return part is not None and part.boundary < len(part.ref)


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens that every sequence goes on by, and the segments of which the stored rest follows.

    Attributes:
        ids, real: The tokens, and which of them are no padding behind a shorter text.
        lengths: Tokens of each sequence before.
        rests: Sequence and segment.
    """

    ids: Int[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"]
    lengths: Int[np.ndarray, " batch"]
    rests: tuple[tuple[int, Reused], ...]

    @property
    def tokens(self) -> int:
        """Tokens of each sequence, padding included."""
        return self.ids.shape[1]

    @property
    def places(self) -> Int[Tensor, "batch tokens"]:
        """Positions of the tokens."""
        return (torch.from_numpy(self.lengths)[:, None] + self.real.cumsum(1) - 1).clamp(min=0)

    def mask(self, device: torch.device) -> PaddingMask | None:
        """Which slots of the cache and of the piece hold tokens, where not all do."""
        slots = int(self.lengths.max(initial=0))
        before = np.arange(slots) >= slots - self.lengths[:, None]
        if before.all() and self.real.all():
            return None
        flags = torch.cat([torch.from_numpy(before), self.real], 1).to(device)
        return PaddingMask.make(flags[:, None, None], False, None)


def pieces_of(columns: Sequence[Column], lengths: Int[np.ndarray, " batch"]) -> Iterator[Piece]:
    """What continues sequences of these lengths, in order: boundaries of at most `CHUNK` tokens and what follows."""
    for column in columns:
        firsts = [() if part is None else part.ref.ids[: part.boundary] for part in column]
        longest = max(map(len, firsts))
        for start in range(0, max(longest, 1), CHUNK):
            ids, real = padded([first[start : start + CHUNK] for first in firsts])
            last = start + CHUNK >= longest
            rests = tuple((b, part) for b, part in enumerate(column) if last and is_spliced(part))
            yield Piece(ids, real, lengths, rests)
            lengths = lengths + real.sum(1).numpy()
            for b, part in rests:
                lengths[b] += len(part.ref) - part.boundary


def put(
    model: Any, cache: RedKnotCache, store: SegmentStore, columns: Sequence[Column], relocation: Relocation | None
) -> None:
    """Continues every sequence of a cache by segments, column by column; the cache's pages are mutated.

    Args:
        model: The model of the store.
        cache: Holds as many sequences as the columns have entries, or nothing yet.
        store: Where the segments are.
        columns: What every sequence goes on by, segment by segment.
        relocation: How keys move; `None` if none has to.
    """
    batch = len(columns[0])
    rows = next(layer.rows for _, layer in row_layers(cache))
    lengths = np.zeros(batch, np.int64) if rows is None else rows.lengths
    totals = lengths + np.array([sum(len(c[b].ref) for c in columns if c[b] is not None) for b in range(batch)])  # pyright: ignore[reportOptionalMemberAccess]
    for pieces in _passes(list(pieces_of(columns, lengths)), _stored_bytes(store)):
        assembly = Assembly(model, cache, store, pieces, totals, relocation)
        with record_function("redknot: assembly"):
            assembly.run()


def _stored_bytes(store: SegmentStore) -> Callable[[Piece], int]:
    """Tells about how many bytes the stored rests of a piece are."""
    config = store.model.config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return lambda piece: sum(store.plan.nbytes(len(part.ref), dim, store.model.dtype) for _, part in piece.rests)


def _passes(pieces: Sequence[Piece], stored_bytes: Callable[[Piece], int]) -> Iterator[list[Piece]]:
    """Pieces in order, as many in one forward pass as its bounds let in."""
    some: list[Piece] = []
    tokens = nbytes = 0
    for piece in pieces:
        tokens, nbytes = tokens + piece.ids.numel(), nbytes + stored_bytes(piece)
        if some and (tokens > _PASS_TOKENS or nbytes > _PASS_BYTES):
            yield some
            some, tokens, nbytes = [], piece.ids.numel(), stored_bytes(piece)
        some.append(piece)
    yield some


class Assembly(Cache):
    """What the model takes for its cache in such a pass: it leads every step through the layer piece by piece.

    Args:
        model, cache, store, relocation: As for `put`.
        pieces: Those of the pass.
        totals: Tokens that the sequences will have when everything has been put, for which pages are reserved.
    """

    def __init__(
        self,
        model: Any,
        cache: RedKnotCache,
        store: SegmentStore,
        pieces: Sequence[Piece],
        totals: Int[np.ndarray, " batch"],
        relocation: Relocation | None,
    ) -> None:
        super().__init__(layers=cache.layers)
        self.model, self.cache, self.pieces, self.totals = model, cache, pieces, totals
        parts = [part for piece in pieces for _, part in piece.rests]
        with record_function("redknot: fetch"):  # now, since what was lost is computed anew, by passes of its own
            held = store.fetch([part.ref for part in parts])
        with record_function("redknot: angles"):
            turns = [self._rotations(part, one.segment, relocation) for part, one in zip(parts, held, strict=True)]
        self._held = {id(part): one for part, one in zip(parts, held, strict=True)}
        self._turns = {id(part): turn for part, turn in zip(parts, turns, strict=True)}
        self._here: dict[int, Segment] = {}
        self._masks: dict[tuple[int, torch.device], PaddingMask | None] = {}

    def run(self) -> None:
        """Runs the pieces' tokens through the model, and puts what is stored in its place on the way."""
        if any(piece.tokens for piece in self.pieces):
            ids, places = (
                torch.cat(x, 1).to(self.model.device)
                for x in zip(*((p.ids, p.places) for p in self.pieces), strict=True)
            )
            self.model(input_ids=ids, position_ids=places, past_key_values=self, logits_to_keep=1)
            return
        for index, layer in row_layers(self.cache):
            for piece in self.pieces:
                self._follow(layer, index, piece)
            layer.on_device()

    @torch.compiler.disable(reason="segments are put into a cache between the pieces of a step")  # pyright: ignore
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands the new keys and values on; the attention function will come back here with them."""
        keys, values = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(keys, RedKnotHandle):
            keys.redknot.attend = partial(self._attend, layer_idx, keys.redknot, [])
        return keys, values

    def _attend(
        self, index: int, whole: Step, steps: list[Step], query: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Float[Tensor, "batch tokens query_heads value_dim"]:
        """Attends the tokens of all pieces; `steps` keeps those of a first time for layers that share the keys."""
        if mask is not None and not isinstance(mask, PaddingMask):
            raise ValueError(
                f"{self.model.config.model_type} attends under a mask of its own, which says nothing of tokens put "
                "between others: pass boundary=0, or read the text without reuse"
            )
        layer, again = whole.layer, bool(steps)
        found, start = [], 0
        if not again:
            layer.reserve(self.totals)
        for i, piece in enumerate(self.pieces):
            if piece.tokens:
                part = slice(start, start + piece.tokens)
                start += piece.tokens
                if not again:
                    key, value = whole.key[:, :, part], whole.value[:, :, part]
                    steps.append(Step(layer, key, value, layer.slots, passed_over=True))
                step = steps[len(found)]
                found.append(attend_step(query[:, :, part], step, self._mask(i, query.device), options))
            if not again:
                self._follow(layer, index, piece)
        layer.on_device()  # a captured step may be next
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _mask(self, piece: int, device: torch.device) -> PaddingMask | None:
        if (piece, device) not in self._masks:
            self._masks[piece, device] = self.pieces[piece].mask(device)
        return self._masks[piece, device]

    def _follow(self, layer: RedKnotLayer, index: int, piece: Piece) -> None:
        """Puts the stored rests of a piece behind it."""
        with record_function("redknot: splice"):
            self._splice(layer, index, piece)
        settle_slots(layer)

    def _splice(self, layer: RedKnotLayer, index: int, piece: Piece) -> None:
        for sequence, part in piece.rests:
            if id(part) not in self._here:
                self._here[id(part)] = self._held[id(part)].here()
            segment = self._here[id(part)]
            if not layer.is_initialized:
                initialize(layer, index, self.model, segment, len(self.totals))
            layer.reserve(self.totals)
            splice(layer, index, sequence, segment, part.boundary, self._turns[id(part)][index])

    def _rotations(self, part: Reused, segment: Segment, relocation: Relocation | None) -> Sequence[Rotation | None]:
        """How far the keys of each layer turn."""
        if not part.moved:
            return [None] * len(segment.layers)
        if relocation is None:
            raise ValueError(f"{self.model.config.model_type}: its keys cannot be moved, and {part.ref} must be")
        there = torch.arange(len(part.ref)) + len(part.ref.prefix)
        return relocation.rotations(there, there - there[0] + part.start, segment.data.device)


def initialize(layer: RedKnotLayer, index: int, model: Any, segment: Segment, batch: int) -> None:
    """Gives a layer its shape before any forward pass has."""
    kept = segment.layers[index]
    assert kept is not None
    heads, like = len(kept.window), segment.data.new_empty(0).to(_device_of_layer(model, index))
    shapes = ((batch, heads, 0, dim) for dim in (kept.key_dim, kept.value_dim))
    layer.lazy_initialization(*(like.new_empty(shape) for shape in shapes))


def _device_of_layer(model: Any, index: int) -> torch.device:
    """Where the layer runs: that of its attention's weights, or of the hook that brings them."""
    if not hasattr(model, "hf_device_map"):
        return model.device
    for module in model.modules():
        if getattr(module, "layer_idx", None) == index and (weights := next(module.parameters(), None)) is not None:
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            return weights.device if device is None else torch.device(device)
    return model.device
