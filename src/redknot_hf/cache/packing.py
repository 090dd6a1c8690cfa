"""Putting stored keys and values into the pages of a cache: one bulk copy a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from redknot_kernels import UNBOUNDED, HeadRules, Pages, Rotation
from torch import Tensor

from .span import KeptLayer, PackedLayers, Span
from .storage import Storage

Known = tuple[int, Int[np.ndarray, " heads"]]


def splice(
    storage: Storage,
    index: int,
    sequence: int,
    segment: PackedLayers,
    rotation: Rotation | None = None,
    first: int = 0,
) -> None:
    """Continues one sequence with a segment as it is stored; its pages are mutated.

    Every row takes what its rule lets it keep: all tokens, or the sinks that fall among the first positions of the
    context, and the last ones. The caller aligns slots when all sequences are done.

    Args:
        storage: Where to.
        index: Which layer of the segment that is.
        sequence: Which sequence of the batch.
        segment: What is stored.
        rotation: How far the key of each token of the segment turns; `None` where it stands where it was computed.
        first: Tokens of the segment that the sequence ends with already.

    Raises:
        ValueError: The segment keeps less than the layer's heads need.
    """
    start, rules = int(storage.rows.lengths[sequence]) - first, storage.rows.rules
    keys, values, kept, rotation = _here(segment, index, rules, storage.device, rotation)
    span, grown = (segment.tokens, first, start), known(segment, index, rules, start, first)
    storage.place(sequence, keys, values, kept, span, [grown], rotation)


def lay_out(
    storage: Storage,
    index: int,
    segment: PackedLayers,
    pages: Pages,
    table: Int[Tensor, "heads columns"],
    rules: HeadRules,
    span: tuple[int, int, int],
    rotation: Rotation | None,
) -> None:
    """Writes one layer of a segment to pages that are no cache's; the rest is as the kernel takes it.

    Raises:
        ValueError: The segment keeps less than the layer's heads need.
    """
    keys, values, kept, rotation = _here(segment, index, storage.rows.rules, pages.device, rotation)
    storage.kernels.place(pages, keys, values, table, rules, kept, span, rotation)


def known(segment: PackedLayers, index: int, rules: HeadRules, start: int, first: int) -> Known:
    """By how many tokens a segment at `start` continues its first ones, and from which position on rows know them."""
    tails = _kept(segment, index, rules).tails(segment.tokens)
    return segment.tokens - first, start + np.maximum(tails, segment.tokens - np.array(rules.as_seen.ring))


def span_of(storages: Sequence[Storage | None], sequence: int, slack: bool = True) -> Span:
    """What the storages of a cache's layers hold of one sequence; without `slack`, what their windows need of it."""
    kept, packed, length = [], [], 0
    for storage in storages:
        if storage is None:
            kept.append(None)
            continue
        rows, pages = storage.rows, storage.pool.pages
        length = int(rows.lengths[sequence])
        last = (length - np.maximum(rows.oldest()[sequence], 0)).tolist()
        most = [length] * len(last) if slack else rows.rules.as_seen.window
        window = tuple(
            UNBOUNDED if w >= UNBOUNDED else min(n, m) for w, n, m in zip(rows.rules.window, last, most, strict=True)
        )
        kept.append(KeptLayer(window, rows.rules.as_seen.sink, pages.keys.shape[-1], pages.values.shape[-1]))
        packed.append(storage.read(sequence, *kept[-1].packed(length)))
    home = packed[0][0].device
    data = torch.cat([x.flatten().to(home) for half in zip(*packed, strict=True) for x in half])
    return Span(length, tuple(kept), data)


def take_over(storage: Storage, index: int, sequence: int, span: Span) -> None:
    """Lets the rows of an empty sequence hold what a span does, as far as their rules keep it.

    Raises:
        ValueError: The span lacks what the next query of a row sees.
    """
    kept = span.layers[index]
    if kept is None:
        raise ValueError(f"layer {index} of the cache holds keys, and the span has none of it")
    keys, values = (x.to(storage.device) for x in (span.keys(index), span.values(index)))
    hold(storage, index, sequence, kept, span.tokens, keys, values)


def hold(
    storage: Storage,
    index: int,
    sequence: int,
    kept: KeptLayer,
    tokens: int,
    keys: Float[Tensor, "kept key_dim"],
    values: Float[Tensor, "kept value_dim"],
    since: Int[np.ndarray, " heads"] | None = None,
) -> None:
    """Lets the rows of an empty sequence hold packed tokens, as far as their rules keep them; mutates the pages.

    Args:
        storage, index, sequence: Where to; which layer that is, and which sequence.
        kept: What there is of a text of `tokens`, in the order of `keys` and `values`.
        since: Positions from which on each row counts as holding all, where that is later than `kept` says.

    Raises:
        ValueError: The next query of a row sees more.
    """
    rules = storage.rows.rules.as_seen
    if not _suffices(kept, rules, tokens):
        raise ValueError(
            f"layer {index}: of each head (window, sink) there is {list(zip(kept.window, kept.sink, strict=True))}, "
            f"and the plan of the cache needs {list(zip(rules.window, rules.sink, strict=True))}: give the cache a "
            "plan that keeps no more"
        )
    first = np.maximum(kept.tails(tokens), tokens - np.array(rules.ring))
    known = tokens, first if since is None else np.maximum(first, since)
    storage.place(sequence, keys, values, (kept.window, kept.sink), (tokens, 0, 0), [known])


def _suffices(kept: KeptLayer, rules: HeadRules, tokens: int) -> bool:
    """Whether all is kept that the next query behind a text sees; a window reaches one token less far behind it."""
    if len(kept.window) != rules.heads:
        return False
    heads = zip(kept.window, kept.sink, rules.window, rules.sink, strict=True)
    return all(has + first >= tokens or (has >= window - 1 and first >= sink) for has, first, window, sink in heads)


def _here(
    segment: PackedLayers, index: int, rules: HeadRules, device: torch.device, rotation: Rotation | None
) -> tuple[Tensor, Tensor, tuple[tuple[int, ...], tuple[int, ...]], Rotation | None]:
    """Keys, values, what is kept of them, and angles, wherever a segment's data is."""
    kept = _kept(segment, index, rules)
    early = device.type != "cpu"  # the host would read at once what a device still writes
    keys, values = (x.to(device, non_blocking=early) for x in segment.pair(index))
    if rotation is not None:
        cos, sin = (x.to(device, non_blocking=early) for x in (rotation.cos, rotation.sin))
        rotation = Rotation(cos, sin, rotation.interleaved)
    return keys, values, (kept.window, kept.sink), rotation


def _kept(segment: PackedLayers, index: int, rules: HeadRules) -> KeptLayer:
    """What the segment keeps of a layer, if that is enough."""
    kept = segment.layers[index]
    if kept is None:
        raise ValueError(f"layer {index} of the cache holds keys, and the segment has none of it")
    enough = len(kept.window) == rules.heads
    pairs = zip(kept.window, kept.sink, rules.window, rules.sink, strict=True) if enough else ()
    if not enough or any(kw < w or (kw < UNBOUNDED and ks < s) for kw, ks, w, s in pairs):
        raise ValueError(
            f"layer {index}: the segment keeps {list(zip(kept.window, kept.sink, strict=True))} (window, sink) a "
            f"head, and the plan of the cache needs {list(zip(rules.window, rules.sink, strict=True))}: add the text "
            "to a store of this plan"
        )
    return kept
