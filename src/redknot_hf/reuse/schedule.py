"""Segments on their way into a sequence: where each will stand, and in which forward pass what of it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from jaxtyping import Int

from redknot_hf.plan.plan import HeadPlan, HeadSpec

from .store import SegmentRef, SegmentStore

# Share of a segment that is recomputed in its new context, unless said otherwise.
BOUNDARY = 0.1

Amount = int | float | Literal["all"]
Policy = Callable[[SegmentRef, int], Amount]
Boundary = Amount | Sequence[Amount] | Policy
Refs = Sequence[SegmentRef] | Sequence[Sequence[SegmentRef]]
# Tokens of one forward pass, those of all sequences together.
_PASS_TOKENS = 8192
# Bytes of stored segments that a pass brings to the device beside the cache; a single segment may be more. Where much
# of a GPU is free it is that share of it: every pass more takes the host's time again, and reads the rows.
_PASS_BYTES = 2**30
_PASS_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Reused:
    """How one segment came into a sequence of a cache.

    Attributes:
        ref: The segment.
        start: Position of its first token.
        boundary: First tokens that were recomputed.
        moved: The rest stands elsewhere than it was computed, so its keys were rotated.
        chosen: Tokens behind the boundary that were recomputed too, in order.
    """

    ref: SegmentRef
    start: int
    boundary: int
    moved: bool
    chosen: tuple[int, ...] = ()

    @property
    def recomputed(self) -> int:
        """How many tokens were."""
        return self.boundary + len(self.chosen)


def is_spliced(part: Reused | None) -> TypeGuard[Reused]:
    """Whether some of a segment is taken as it is stored."""
    return part is not None and part.boundary < len(part.ref)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a sequence goes on by: tokens of a segment's boundary, and behind the last of them the stored rest.

    Attributes:
        part: The segment and its place.
        first, stop: Which tokens of its boundary run through the model; with the rest go those chosen of it.
    """

    part: Reused
    first: int
    stop: int

    @property
    def rest(self) -> bool:
        """Whether the stored rest follows."""
        return self.stop == self.part.boundary and is_spliced(self.part)

    @property
    def tokens(self) -> Int[np.ndarray, " tokens"]:
        """Which tokens of the segment run through the model."""
        chosen = self.part.chosen if self.rest else ()
        return np.concatenate([np.arange(self.first, self.stop), np.array(chosen, np.int64)])

    @property
    def places(self) -> Int[np.ndarray, " tokens"]:
        """Positions of these tokens."""
        return self.part.start + self.tokens

    @property
    def end(self) -> int:
        """Position behind the chunk."""
        return self.part.start + (len(self.part.ref) if self.rest else self.stop)


def as_batch(segments: Refs) -> list[list[SegmentRef]]:
    """One list of segments a sequence, of which at least one has some."""
    if isinstance(segments, SegmentRef):
        raise ValueError("the context is one segment: give a list of them, [segment]")
    single = all(isinstance(one, SegmentRef) for one in segments)
    batch: list[list[SegmentRef]] = [list(one) for one in ([segments] if single else segments)]  # pyright: ignore
    for one in (one for refs in batch for one in refs):
        if not isinstance(one, SegmentRef):
            raise ValueError(f"a segment is {one!r:.40}: give what SegmentStore.add returned")
    if not any(batch):
        raise ValueError("there are no segments to assemble: begin with RedKnotCache(model.config, plan)")
    return batch


def store_of(batch: Sequence[Sequence[SegmentRef]], model: Any) -> SegmentStore:
    """The one store that all segments are in, which must be the model's."""
    stores = {id(ref.store): ref.store for sequence in batch for ref in sequence}
    if len(stores) > 1:
        raise ValueError(f"the segments come from {len(stores)} stores: add them all to one")
    (store,) = stores.values()
    if store is None:
        raise ValueError(
            "the segments come from another process: name them anew, "
            "store.ref(segment.ids, segment.prefix, stand_in=False)"
        )
    if store.model is not model:
        raise ValueError("the segments belong to another model: add the texts to a SegmentStore of this one")
    return store


def schedule(sequence: Sequence[SegmentRef], boundary: Boundary) -> tuple[Reused, ...]:
    """Where each segment will stand, and how much of it is recomputed there."""
    if isinstance(boundary, Sequence) and not isinstance(boundary, str) and len(boundary) != len(sequence):
        raise ValueError(f"boundary has {len(boundary)} entries for {len(sequence)} segments: give one for each")
    context: tuple[int, ...] = ()
    parts = []
    for index, ref in enumerate(sequence):
        per_segment = isinstance(boundary, Sequence) and not isinstance(boundary, str)
        asked = boundary[index] if per_segment else boundary  # pyright: ignore[reportIndexIssue]
        tokens = _tokens(asked, ref, len(context))
        if boundary != "all" and ref.prefix == context:
            tokens = 0  # it is right as it is
        parts.append(Reused(ref, len(context), tokens, len(context) != len(ref.prefix)))
        context += ref.ids
    return tuple(parts)


def _tokens(asked: Any, ref: SegmentRef, start: int) -> int:
    if callable(asked):
        asked = asked(ref, start)
    if asked == "all":
        return len(ref)
    if hasattr(asked, "item"):  # a number of numpy or torch
        asked = asked.item()
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not asked >= 0 or (asked > 1 and asked % 1):
        raise ValueError(f"boundary={asked!r}: give tokens (an int), a share (a float from 0 to 1), or 'all'")
    if isinstance(asked, float):
        if asked > 1:
            raise ValueError(f"boundary={asked!r} is a float, so a share, and above 1: give tokens as an int")
        return math.ceil(asked * len(ref))
    return min(asked, len(ref))


def by_rank(scores: Sequence[int | float | None], documents: int = 2, rest: Amount = 0) -> list[Amount]:
    """A boundary that recomputes whole the documents which a retriever ranks best.

    Args:
        scores: One for each segment, higher is better; `None` for one that was not ranked, such as an opening.
        documents: How many are recomputed whole.
        rest: Boundary of the others.

    Raises:
        ValueError: The number is negative.
    """
    if documents < 0:
        raise ValueError(f"documents={documents}: give how many are recomputed whole")
    ranked = sorted((i for i, score in enumerate(scores) if score is not None), key=lambda i: -scores[i])  # pyright: ignore
    best = set(ranked[:documents])
    return ["all" if i in best else rest for i in range(len(scores))]


def passes(
    batch: Sequence[Sequence[Reused]], store: SegmentStore, tokens: int | None = None
) -> Iterator[tuple[Sequence[Chunk], ...]]:
    """What every sequence goes on by, one forward pass after the other, each as large as its bounds let it be.

    Args:
        batch: The segments of each sequence.
        store: Where they are.
        tokens: That a pass may recompute, those of all sequences together; 8192 unless said otherwise.
    """
    most = max((tokens or _PASS_TOKENS) // len(batch), 1)
    nbytes, room = _stored_bytes(store), _room(store.tiers.device)
    return zip_longest(*(_grouped(parts, most, nbytes, room) for parts in batch), fillvalue=())


def _room(device: torch.device) -> float:
    """Bytes of stored segments that a pass may bring to a device."""
    if device.type != "cuda":
        return float(_PASS_BYTES)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(float(_PASS_BYTES), _PASS_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))


def _grouped(parts: Sequence[Reused], most: int, nbytes: Callable[[Chunk], int], room: float) -> Iterator[list[Chunk]]:
    """Chunks of one sequence in order, as many in a pass as its bounds let in, and at least one."""
    some: list[Chunk] = []
    tokens = stored = 0
    for chunk in _chunks(parts, most):
        tokens, stored = tokens + len(chunk.tokens), stored + nbytes(chunk)
        if some and (tokens > most or stored > room):
            yield some
            some, tokens, stored = [], len(chunk.tokens), nbytes(chunk)
        some.append(chunk)
    if some:
        yield some


def _chunks(parts: Sequence[Reused], most: int) -> Iterator[Chunk]:
    for part in parts:
        for first in range(0, max(part.boundary, 1), most):
            yield Chunk(part, first, min(first + most, part.boundary))


def _stored_bytes(store: SegmentStore) -> Callable[[Chunk], int]:
    """Tells about how many bytes the stored rest of a chunk is."""
    if store.coarse is not None:
        return lambda chunk: store.outline(chunk.part.ref).nbytes if chunk.rest else 0
    config = store.model.config
    kept = store.plan if store.keep == "plan" else HeadPlan.uniform(config, HeadSpec())
    return lambda chunk: kept.nbytes(len(chunk.part.ref), config, store.model.dtype) if chunk.rest else 0


def spot(part: Reused) -> tuple[str, int]:
    """What is stored of a segment, and where it will stand."""
    return part.ref.address, part.start


def originals(batch: Sequence[Sequence[Chunk]]) -> list[int]:
    """For each sequence the first of the same segments at the same places, of which as much is taken as stored."""
    first: dict[tuple[Any, ...], int] = {}
    alike = [tuple((*spot(chunk.part), chunk.part.boundary, chunk.end) for chunk in chunks) for chunks in batch]
    return [first.setdefault(key, b) for b, key in enumerate(alike)]
