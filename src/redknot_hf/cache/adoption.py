"""Filling an empty cache with what another one holds: spans of a RedKnotCache, or the tensors of a DynamicCache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from redknot_kernels import UNBOUNDED
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from .layer import RedKnotLayer
from .packing import hold, span_of, take_over
from .span import KeptLayer, Span

Flags = Bool[Tensor, "batch slots"]


def spans_of(layers: Sequence[Any], batch: int, slack: bool = True) -> list[Span]:
    """What filled layers hold of each sequence; without `slack`, what their windows need of it.

    Raises:
        ValueError: A layer keeps more than keys and values.
    """
    _check_packable(layers)
    held = {i: layer.storage for i, layer in _with_keys(layers) if layer.is_initialized}
    storages = [held.get(i) for i in range(len(layers))]
    return [span_of(storages, b, slack) for b in range(batch)]


def extend(layers: Sequence[Any], spans: Sequence[Span]) -> None:
    """Lets empty layers hold spans, one a sequence.

    Raises:
        ValueError: The layers hold tokens; the spans are another model's, too long, or lack what the rules need.
    """
    _check_packable(layers)
    longest, first = max((span.tokens for span in spans), default=0), next(_with_keys(layers))[1]
    if first.get_seq_length() or not longest:
        raise ValueError("spans begin with the first token: extend an empty cache, by one span or more")
    most = first.get_max_length()
    if any(len(span.layers) != len(layers) for span in spans) or 0 <= most < longest:
        raise ValueError(
            f"the spans are of {sorted({len(span.layers) for span in spans})} layers and up to {longest} tokens, "
            f"the cache has {len(layers)} layers and max_cache_len={most}"
        )
    for i, layer in _with_keys(layers):
        kept = spans[0].layers[i]
        if kept is not None and (not layer.is_initialized or layer.batch_size != len(spans)):
            shape = (len(spans), len(kept.window), 0)
            layer.begin(*(spans[0].data.new_empty(*shape, dim) for dim in (kept.key_dim, kept.value_dim)))
        for b, span in enumerate(spans if kept is not None or layer.is_initialized else ()):
            take_over(layer.storage, i, b, span)
        if layer.is_initialized:
            layer.storage.left_align()


def adopt(layers: list[Any], source: Cache, mask: Tensor | None) -> None:
    """Lets empty layers hold what a `DynamicCache` does, which stays as it is; layers without keys are copied.

    Args:
        layers: Those of a RedKnotCache.
        source: Of the same model.
        mask: `[batch, slots]`, 0 where a slot is padding; `None` if none is.

    Raises:
        TypeError: `source` keeps its tokens in another way.
        ValueError: It is another model's, too long, or lacks what the layers' rules need; or the mask does not fit.
    """
    theirs: list[Any] = list(getattr(source, "layers", ()))
    slots = _checked(layers, source, theirs)
    real = None if mask is None or not slots else _real(mask, next(_with_keys(layers))[0], theirs, slots)
    for i, other in enumerate(theirs):
        layer = layers[i]
        if not isinstance(layer, RedKnotLayer):
            layers[i] = deepcopy(other)
        elif slots:
            # Offloaded layers come back to where the model's steps do.
            keys, values = (x.detach().to(other.device) for x in (other.keys, other.values))
            _adopt(i, layer, keys.to(values.dtype), values, slots, real)


def _adopt(index: int, layer: RedKnotLayer, keys: Tensor, values: Tensor, slots: int, real: Flags | None) -> None:
    """Lets one layer hold keys and values `[batch, heads, last slots, dim]`."""
    layer.begin(keys[:, :, :0], values[:, :, :0])
    storage, lost = layer.storage, slots - keys.shape[2]
    rules = storage.rows.rules.as_seen
    for b in range(len(keys)):
        packed, gone = (keys[b], values[b]), lost
        if real is not None:
            mine = real[b, lost:].nonzero()[:, 0].to(keys.device)
            packed, gone = [x.index_select(1, mine) for x in packed], int(real[b, :lost].sum())
        held = packed[0].shape[1]
        first, since = 0, np.full(rules.heads, gone)
        if gone and held >= rules.reach - 1:
            # What a layer has lost, its model's own window hides: zeros take the slots of sinks that it had.
            first = min(max(rules.sink), gone)
            # Cut back, queries would see them, so such heads count as holding no more than they need.
            late = gone + rules.reach - np.array(rules.window)
            since = np.where(np.array(rules.sink) > 0, np.maximum(late, gone), gone)
            packed = [torch.nn.functional.pad(x, (0, 0, first, 0)) for x in packed]
        window = held if gone else UNBOUNDED
        kept = KeptLayer((window,) * rules.heads, (first,) * rules.heads, keys.shape[-1], values.shape[-1])
        if held:
            flat_keys, flat_values = (x.flatten(0, 1) for x in packed)
            hold(storage, index, b, kept, gone + held, flat_keys, flat_values, since)
    storage.align(slots if real is None else real.to(layer.device))


def _checked(layers: Sequence[Any], source: Cache, theirs: Sequence[Any]) -> int:
    """The slots that a `DynamicCache` holds, if its layers can be taken over by these."""
    others = [
        theirs[i]
        for i, layer in enumerate(layers[: len(theirs)])
        if type(theirs[i]) not in ((DynamicLayer, DynamicSlidingWindowLayer) if _keyed(layer) else (type(layer),))
    ]
    if not theirs or others:
        found = type(others[0]).__name__ if others else "no layers that it knows of"
        raise TypeError(
            f"from_cache takes over a filled DynamicCache of the model's, and got a {type(source).__name__} with "
            f"{found}: read the text with DynamicCache(config=model.config)"
        )
    if len(theirs) != len(layers):
        raise ValueError(
            f"the DynamicCache has {len(theirs)} layers, and this config's model keeps keys in {len(layers)}: give "
            "the config of the model that filled it"
        )
    held = {i: theirs[i].get_seq_length() for i, _ in _with_keys(layers)}
    if len(set(held.values())) > 1:
        raise ValueError(
            f"the layers of the DynamicCache hold {sorted(set(held.values()))} slots: a forward pass broke off "
            "between them; read the text again"
        )
    slots, (_, first) = next(iter(held.values())), next(_with_keys(layers))
    if first.max_cache_len is not None and slots > first.max_cache_len:
        raise ValueError(f"the DynamicCache holds {slots} slots and exceeds max_cache_len={first.max_cache_len}")
    return slots


def _real(mask: Tensor, index: int, theirs: Sequence[Any], slots: int) -> Flags | None:
    """Which slots hold real tokens; `None` if all do."""
    wanted = (len(theirs[index].keys), slots)
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}: give one of {wanted}, all sequences and slots that the "
            "DynamicCache holds, generated ones included"
        )
    odd = mask[(mask < 0) | mask.isnan()]
    if len(odd):
        raise ValueError(
            f"attention_mask holds {odd[0].item()}: give 1 where a token is and 0 where a slot is padding, as the "
            "tokenizer does, and not what is added to logits"
        )
    real = mask.cpu() != 0
    return None if bool(real.all()) else real


def _check_packable(layers: Sequence[Any]) -> None:
    other = next((layer for layer in layers if isinstance(layer, LinearAttentionLayer)), None)
    if other is not None:
        raise ValueError(f"a {type(other).__name__} keeps more than keys and values, which spans do not hold")


def _keyed(layer: Any) -> bool:
    return isinstance(layer, RedKnotLayer)


def _with_keys(layers: Sequence[Any]) -> Iterator[tuple[int, RedKnotLayer]]:
    return ((i, layer) for i, layer in enumerate(layers) if isinstance(layer, RedKnotLayer))
