"""Caches assembled from stored segments: `assemble(model, segments, boundary=...)`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from jaxtyping import Int
from redknot_kernels import Rotation
from torch import Tensor
from torch.profiler import record_function

from .cache import RedKnotCache
from .layer import RedKnotLayer
from .recording import forward, row_layers
from .rope import Relocation
from .segment import Segment
from .segments import SegmentRef, SegmentStore
from .splice import settle_slots, splice

# Share of a segment that is recomputed in its new context, unless said otherwise.
BOUNDARY = 0.1
# Segments that are on their way to the device while one is put in place.
_AHEAD = 3

Amount = int | float | Literal["all"]
Policy = Callable[[SegmentRef, int], Amount]
Boundary = Amount | Sequence[Amount] | Policy
Refs = Sequence[SegmentRef] | Sequence[Sequence[SegmentRef]]


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


class AssembledCache(RedKnotCache):
    """A RedKnotCache whose tokens came from stored segments; used like any other.

    Attributes:
        reused: For each sequence of the batch, its segments in order. Tokens that the cache got since do not count.
        refreshed_tokens: Tokens that `refresh` chose and computed anew.
    """

    reused: tuple[tuple[Reused, ...], ...] = ()
    refreshed_tokens: int = 0

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that went through the model, over all sequences; a lead that sequences share counts for each."""
        return self.refreshed_tokens + sum(part.boundary for sequence in self.reused for part in sequence)

    @property
    def reused_tokens(self) -> int:
        """Tokens of which stored keys and values were taken, over all sequences."""
        return sum(len(part.ref) for sequence in self.reused for part in sequence) - self.recomputed_tokens


@torch.no_grad()
def assemble(
    model: Any,
    segments: Refs,
    *,
    boundary: Boundary = BOUNDARY,
    page_size: int = 64,
    max_cache_len: int | None = None,
    impl: str | None = None,
    force: bool = False,
) -> AssembledCache:
    """Builds the cache of a context out of stored segments.

    Segment by segment: its first tokens, the boundary, run through the model as a prefill on the cache so far, so
    their keys and values are right in this context; the stored rest is rotated to its place and put into the pages. A
    segment whose prefix is exactly what stands before it needs neither. The cache then serves `generate` with the
    whole prompt (`prompt` makes it), several questions, further turns.

    Source: boundary replay of RedKnot, arXiv 2606.06256, and of its later code (reuse of stored keys by position).

    Args:
        model: The model of the store.
        segments: What `SegmentStore.add` returned, in order; or a list of these for each sequence of a batch, where
            the segments that all sequences begin with are put in place once.
        boundary: Tokens of each segment to recompute, or a share of it (a float); one value, one for each segment, or
            a function of the segment and its position. `"all"` recomputes everything, which is a dense prefill, and
            `0` nothing, which is naive reuse.
        page_size, max_cache_len, impl: Of the cache.
        force: Reuse even if the model fails the store's gate.

    Returns:
        The cache, of which the caller may do as with any other.

    Raises:
        ValueError: There are no segments, they come from several stores or another model, the model's keys cannot be
            moved, or an argument is off.
    """
    batch = as_batch(segments)
    store = store_of(batch, model)
    store.check_weights()
    cache = AssembledCache(model.config, store.plan, page_size=page_size, max_cache_len=max_cache_len, impl=impl)
    cache.reused = tuple(schedule(sequence, boundary) for sequence in batch)
    columns = list(zip_longest(*cache.reused))
    spliced = any(_is_spliced(part) for column in columns for part in column)
    relocation = relocation_of(store, force) if spliced else None
    lead = len(list(takewhile(lambda column: len(set(column)) == 1, columns))) if len(batch) > 1 else len(columns)
    columns = [column if i >= lead else column[:1] for i, column in enumerate(columns)]
    waiting = _fetched_ahead(store, [part for column in columns for part in column if _is_spliced(part)])
    for index, column in enumerate(columns):
        if index == lead:
            cache.batch_repeat_interleave(len(batch))
        # A lead is reserved for alone: what is to come is not shared.
        until = lead if index < lead else len(columns)
        totals = [sum(len(part.ref) for part in sequence[:until]) for sequence in cache.reused[: len(column)]]
        _add(model, cache, column, np.array(totals), waiting, relocation)
    if len(batch) > 1 and lead == len(columns):
        cache.batch_repeat_interleave(len(batch))
    return cache


def prompt(
    segments: Refs, suffixes: Sequence[Sequence[int]] | Sequence[int], device: torch.device | str | None = None
) -> dict[str, Int[Tensor, "batch tokens"]]:
    """What `generate` takes beside the assembled cache: ids and mask of contexts and suffixes, padded on the left.

    Args:
        segments: As given to `assemble`.
        suffixes: What follows each context; one for one sequence.
        device: Of the model.

    Raises:
        ValueError: There is not one suffix for each sequence.
    """
    batch = as_batch(segments)
    ends: list[list[int]] = [list(suffixes)] if suffixes and isinstance(suffixes[0], int) else [*map(list, suffixes)]  # pyright: ignore
    if len(ends) != len(batch):
        raise ValueError(f"{len(ends)} suffixes for {len(batch)} sequences: give one for each")
    contexts = [[i for ref in refs for i in ref.ids] for refs in batch]
    halves = [_left_padded(contexts), _left_padded(ends)]
    ids, real = (torch.cat(parts, 1).to(device) for parts in zip(*halves, strict=True))
    return {"input_ids": ids, "attention_mask": real}


def _left_padded(texts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    longest = max(map(len, texts))
    ids = [[0] * (longest - len(text)) + list(text) for text in texts]
    real = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(real, dtype=torch.long)


def as_batch(segments: Refs) -> list[list[SegmentRef]]:
    """One list of segments a sequence, of which at least one has some."""
    single = all(isinstance(one, SegmentRef) for one in segments)
    batch: list[list[SegmentRef]] = [list(one) for one in ([segments] if single else segments)]  # pyright: ignore
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
            "the segments come from another process: name them anew, store.ref(segment.ids, segment.prefix)"
        )
    if store.model is not model:
        raise ValueError("the segments belong to another model: add the texts to a SegmentStore of this one")
    return store


def relocation_of(store: SegmentStore, force: bool) -> Relocation | None:
    """How keys move, if the model may be reused."""
    verdict = store.verdict()
    if not verdict.passed and not force:
        raise ValueError(
            f"segments are not reused: {verdict.reason} Pass boundary='all', or force=True to do it still."
        )
    return verdict.relocation


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
    if isinstance(asked, bool) or not isinstance(asked, int | float) or asked < 0 or (asked > 1 and asked % 1):
        raise ValueError(f"boundary={asked!r}: give tokens (an int), a share (a float from 0 to 1), or 'all'")
    if isinstance(asked, float):
        if asked > 1:
            raise ValueError(f"boundary={asked!r} is a float, so a share, and above 1: give tokens as an int")
        return math.ceil(asked * len(ref))
    return min(asked, len(ref))


def _is_spliced(part: Reused | None) -> TypeGuard[Reused]:
    return part is not None and part.boundary < len(part.ref)


def _fetched_ahead(store: SegmentStore, parts: Sequence[Reused]) -> Iterator[Segment]:
    """The segments in order, while the next ones are on their way."""
    under_way: deque[Callable[[], Segment]] = deque()
    for part in parts:
        under_way.append(store.fetch(part.ref))
        if len(under_way) > _AHEAD:
            yield under_way.popleft()()
    while under_way:
        yield under_way.popleft()()


def _add(
    model: Any,
    cache: RedKnotCache,
    column: Sequence[Reused | None],
    totals: Int[np.ndarray, " batch"],
    fetched: Iterator[Segment],
    relocation: Relocation | None,
) -> None:
    """Continues every sequence by one segment, or by none: the boundaries in one forward pass, then what is stored."""
    with record_function("redknot: boundary"):
        firsts = [part.ref.ids[: part.boundary] if part is not None else () for part in column]
        forward(model, cache, firsts)
    for sequence, part in enumerate(column):
        if not _is_spliced(part):
            continue
        with record_function("redknot: fetch"):
            segment = next(fetched)
        rotations: Sequence[Rotation | None] = [None] * len(segment.layers)
        if part.moved:
            if relocation is None:
                raise ValueError(f"{model.config.model_type}: its keys cannot be moved, and {part.ref} must be")
            with record_function("redknot: angles"):
                there = torch.arange(len(part.ref)) + len(part.ref.prefix)
                rotations = relocation.rotations(there, there - there[0] + part.start, segment.data.device)
        with record_function("redknot: splice"):
            for i, layer in row_layers(cache):
                if not layer.is_initialized:
                    initialize(layer, i, model, segment, len(column))
                layer.reserve(totals)
                splice(layer, i, sequence, segment, part.boundary, rotations[i])
    for _, layer in row_layers(cache):
        settle_slots(layer)


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
