"""Putting stored keys and values into the pages of a cache, and reading them out: one bulk copy a layer."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from redknot_kernels import UNBOUNDED, HeadRules, Rotation
from torch import Tensor

from .device_rows import staged
from .history import SlotHistory
from .layer import RedKnotLayer
from .rows import Rows
from .segment import KeptLayer, Segment

Packed = Int[np.ndarray, " kept"]


def splice(
    layer: RedKnotLayer, index: int, sequence: int, segment: Segment, first: int = 0, rotation: Rotation | None = None
) -> None:
    """Continues one sequence with a segment's stored tokens from `first` on; its pages are mutated.

    The sequence ends with the segment's first `first` tokens already. Every row takes what its rule lets it keep: all
    tokens, or the sinks that fall among the first positions of the context, and the last ones. The caller settles the
    layer's slots when all sequences are done.

    Args:
        layer: Where to; it has been initialized.
        index: Which layer of the segment that is.
        sequence: Which sequence of the batch.
        segment: What is stored.
        first: Tokens of the segment that the sequence holds.
        rotation: How far the key of each token of the segment turns; `None` where it stands where it was computed.

    Raises:
        ValueError: The segment keeps less than the layer's heads need, or does not fit `max_cache_len`.
    """
    rows, pool = layer.storage()
    kept = segment.layers[index]
    if kept is None:
        raise ValueError(f"layer {index} of the cache holds keys, and the segment has none of it")
    _check(kept, layer, index)
    offset = int(rows.lengths[sequence]) - first
    end = offset + segment.tokens
    if layer.max_cache_len is not None and end > layer.max_cache_len:
        raise ValueError(
            f"the segments reach to token {end} and exceed max_cache_len={layer.max_cache_len}: give assemble a "
            "larger one, or none"
        )
    layer.prefetch()
    lengths = rows.lengths.copy()
    lengths[sequence] = end
    layer.reserve(lengths)
    taken = _taken(kept, rows.rules, segment.tokens, first, offset)
    device = pool.keys.device
    where = taken.places.of(rows, sequence)
    source, target, turn = _on(device, np.stack([taken.source, where, taken.tokens])).unbind()
    keys, values = (x.to(device, non_blocking=True) for x in (segment.keys(index), segment.values(index)))
    if rotation is not None:
        cos, sin = (x.to(device, non_blocking=True) for x in (rotation.cos, rotation.sin))
        rotation = Rotation(cos, sin, rotation.interleaved)
    layer.kernels.place(pool.keys, pool.values, keys, values, source, target, rotation, turn)
    rows.splice(sequence, end - int(rows.lengths[sequence]), taken.since)


def settle_slots(layer: RedKnotLayer) -> None:
    """Lets slots be the real tokens, padded on the left where sequences differ in length: how prompts are padded."""
    rows, _ = layer.storage()
    layer.slots, layer.history = int(rows.lengths.max(initial=0)), SlotHistory()
    if (rows.lengths == layer.slots).all():
        layer.history.add(layer.slots)
    else:
        real = np.arange(layer.slots) >= layer.slots - rows.lengths[:, None]
        layer.history.add(torch.from_numpy(real).to(layer.device))
    layer.on_device()


def read(
    layer: RedKnotLayer, sequence: int, heads: Packed, positions: Packed
) -> tuple[Float[Tensor, "kept key_dim"], Float[Tensor, "kept value_dim"]]:
    """Keys and values of tokens that the rows of one sequence hold."""
    rows, pool = layer.storage()
    where = _on(pool.keys.device, _places(rows.rules, heads, positions).of(rows, sequence))
    keys, values = (x.view(-1, x.shape[-1]).index_select(0, where) for x in (pool.keys, pool.values))
    return keys, values


def _check(kept: KeptLayer, layer: RedKnotLayer, index: int) -> None:
    rules = layer.storage()[0].rules
    enough = len(kept.window) == rules.heads
    pairs = zip(kept.window, kept.sink, rules.window, rules.sink, strict=True) if enough else ()
    if not enough or any(kw < w or (kw < UNBOUNDED and ks < s) for kw, ks, w, s in pairs):
        raise ValueError(
            f"layer {index}: the segment keeps {list(zip(kept.window, kept.sink, strict=True))} (window, sink) a "
            f"head, and the plan of the cache needs {list(zip(rules.window, rules.sink, strict=True))}: add the text "
            "to a store of this plan"
        )


class _Places(NamedTuple):
    """Where rows keep tokens: head, column of the page table, and slot within the page, of each."""

    heads: Packed
    columns: Packed
    slots: Packed

    def of(self, rows: Rows, sequence: int) -> Packed:
        """Index of each in the pool, seen as one run of tokens."""
        return rows.table[sequence, self.heads, self.columns].astype(np.int64) * rows.rules.page_size + self.slots


class _Taken(NamedTuple):
    """What rows take of a segment: place in storage, token and place in the rows of each.

    Attributes:
        since: Position from which on each row holds all tokens.
    """

    source: Packed
    tokens: Packed
    places: _Places
    since: Int[np.ndarray, " heads"]


@lru_cache(maxsize=256)  # many layers have the same rules
def _taken(kept: KeptLayer, rules: HeadRules, length: int, first: int, offset: int) -> _Taken:
    heads, tokens = kept.packed(length)
    sink, ring = np.array(rules.sink), np.array(rules.ring)
    since = np.maximum(offset + kept.tails(length), offset + length - ring)
    positions = offset + tokens
    source = np.flatnonzero((tokens >= first) & ((positions < sink[heads]) | (positions >= since[heads])))
    return _Taken(source, tokens[source], _places(rules, heads[source], positions[source]), since)


def _places(rules: HeadRules, heads: Packed, positions: Packed) -> _Places:
    sink, ring = np.array(rules.sink)[heads], np.array(rules.ring)[heads]
    slots = np.where(positions < sink, positions, sink + (positions - sink) % ring)
    columns = slots // rules.page_size
    return _Places(heads, columns, slots - columns * rules.page_size)


def _on(device: torch.device, index: Int[np.ndarray, "..."]) -> Int[Tensor, "..."]:
    """An index on the device, without waiting for it."""
    return staged(np.ascontiguousarray(index, np.int64), device).to(device, non_blocking=True)
