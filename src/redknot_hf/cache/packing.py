"""Putting stored keys and values into the pages of a cache, and reading them out: one bulk copy a layer."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from redknot_kernels import UNBOUNDED, HeadRules, Pages, Rotation
from torch import Tensor

from .device_rows import staged
from .history import SlotHistory
from .layer import RedKnotLayer
from .span import KeptLayer, Segment

Packed = Int[np.ndarray, " kept"]


def splice(layer: RedKnotLayer, index: int, sequence: int, segment: Segment, rotation: Rotation | None = None) -> None:
    """Continues one sequence with a segment as it is stored; its pages are mutated.

    Every row takes what its rule lets it keep: all tokens, or the sinks that fall among the first positions of the
    context, and the last ones. The caller settles the layer's slots when all sequences are done.

    Args:
        layer: Where to; it has been initialized.
        index: Which layer of the segment that is.
        sequence: Which sequence of the batch.
        segment: What is stored.
        rotation: How far the key of each token of the segment turns; `None` where it stands where it was computed.

    Raises:
        ValueError: The segment keeps less than the layer's heads need.
    """
    rows, pool = layer.storage()
    start = int(rows.lengths[sequence])
    lengths = rows.lengths.copy()
    lengths[sequence] = start + segment.tokens
    with pool.lock:
        layer.bring_back()
        layer.reserve(lengths)
        table = layer.table_on_device()[sequence]
        span = segment.tokens, 0, start
        place(layer, index, segment, pool.pages, table, rows.rules, span, rotation)
        count(layer, index, sequence, segment, 0)


def place(
    layer: RedKnotLayer,
    index: int,
    segment: Segment,
    pages: Pages,
    table: Int[Tensor, "heads columns"],
    rules: HeadRules,
    span: tuple[int, int, int],
    rotation: Rotation | None,
) -> None:
    """Writes one layer of a segment to pages, wherever its data and angles are; the rest is as the kernel takes it.

    Raises:
        ValueError: The segment keeps less than the layer's heads need.
    """
    kept, device = _kept(segment, index, layer), pages.device
    keys, values = (x.to(device, non_blocking=True) for x in (segment.keys(index), segment.values(index)))
    if rotation is not None:
        cos, sin = (x.to(device, non_blocking=True) for x in (rotation.cos, rotation.sin))
        rotation = Rotation(cos, sin, rotation.interleaved)
    layer.kernels.place(pages, keys, values, table, rules, (kept.window, kept.sink), span, rotation)


def count(layer: RedKnotLayer, index: int, sequence: int, segment: Segment, first: int) -> None:
    """Counts a segment that was written behind its first tokens, as far as the rows hold it."""
    rows, _ = layer.storage()
    offset, tokens = int(rows.lengths[sequence]) - first, segment.tokens
    tails = _kept(segment, index, layer).tails(tokens)
    rows.splice(sequence, tokens - first, offset + np.maximum(tails, tokens - np.array(rows.rules.ring)))


def settle_slots(layer: RedKnotLayer) -> None:
    """Lets slots be the real tokens, padded on the left where sequences differ in length: how prompts are padded.

    The caller brings the rows to the device when it is done with the layer.
    """
    rows, _ = layer.storage()
    layer.slots, layer.history = int(rows.lengths.max(initial=0)), SlotHistory()
    if (rows.lengths == layer.slots).all():
        layer.history.add(layer.slots)
    else:
        real = np.arange(layer.slots) >= layer.slots - rows.lengths[:, None]
        layer.history.add(torch.from_numpy(real).to(layer.device))


def read(
    layer: RedKnotLayer, sequence: int, heads: Packed, positions: Packed
) -> tuple[Float[Tensor, "kept key_dim"], Float[Tensor, "kept value_dim"]]:
    """Keys and values of tokens that the rows of one sequence hold."""
    rows, pool = layer.storage()
    size = rows.rules.page_size
    sink, ring = (np.array(x)[heads] for x in (rows.rules.sink, rows.rules.ring))
    slots = np.where(positions < sink, positions, sink + (positions - sink) % ring)
    with pool.lock:
        pages = rows.table[sequence, heads, slots // size].astype(np.int64)
        where = staged(pages * size + slots % size, pool.pages.device).to(pool.pages.device, non_blocking=True)
        keys, values = (x.view(-1, x.shape[-1]).index_select(0, where) for x in pool.pages)
    return keys, values


def _kept(segment: Segment, index: int, layer: RedKnotLayer) -> KeptLayer:
    """What the segment keeps of a layer, if that is enough."""
    kept = segment.layers[index]
    if kept is None:
        raise ValueError(f"layer {index} of the cache holds keys, and the segment has none of it")
    rules = layer.storage()[0].rules
    enough = len(kept.window) == rules.heads
    pairs = zip(kept.window, kept.sink, rules.window, rules.sink, strict=True) if enough else ()
    if not enough or any(kw < w or (kw < UNBOUNDED and ks < s) for kw, ks, w, s in pairs):
        raise ValueError(
            f"layer {index}: the segment keeps {list(zip(kept.window, kept.sink, strict=True))} (window, sink) a "
            f"head, and the plan of the cache needs {list(zip(rules.window, rules.sink, strict=True))}: add the text "
            "to a store of this plan"
        )
    return kept
