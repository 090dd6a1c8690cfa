"""What heads with cold pages attend to when a text is read in chunks, without a cache: pages that go through bits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from redknot_kernels.plain.quantise import dequantise_page, quantise_page
from torch import Tensor, nn

from redknot_hf.attention.dense import dense_attention
from redknot_hf.plan.storage import HOT, PAGE_SIZE, cold_pages

CHUNK = 256  # queries that see the same pages cold
BITS = {"int8": 8, "int4": 4}

Keys = Float[Tensor, "batch heads tokens key_dim"]
Values = Float[Tensor, "batch heads tokens value_dim"]


def attend_stored(
    module: nn.Module,
    query: Float[Tensor, "batch query_heads tokens key_dim"],
    key: Keys,
    value: Values,
    storage: str,
    options: dict[str, Any],
) -> Float[Tensor, "batch tokens query_heads value_dim"]:
    """Attention of global heads of one storage over a whole text.

    Every chunk of queries sees what the heads keep when it begins: the first page and the hot tail as the model made
    them, the pages between as their storage gives them back, and the chunk itself.

    Args:
        module: The attention layer.
        storage: `"int8"` or `"int4"`.
        options: `scale`, `softcap` and `s_aux` (of these query heads), as kernels take them.
    """
    group, tokens, device = query.shape[1] // key.shape[1], query.shape[2], query.device
    cold = [x.repeat_interleave(group, 1) for x in through_bits(key, value, BITS[storage])]
    held = [x.repeat_interleave(group, 1) for x in (key, value)]  # copies, in which pages grow cold
    first, outs = PAGE_SIZE, []
    for start in range(0, tokens, CHUNK):
        stop, last = min(start + CHUNK, tokens), PAGE_SIZE * (1 + cold_pages(start, PAGE_SIZE, HOT))
        for mine, stored in zip(held, cold, strict=True):
            mine[:, :, first:last] = stored[:, :, first:last]
        first = last
        shown = torch.arange(stop, device=device) <= torch.arange(start, stop, device=device)[:, None]
        keys, values = (x[:, :, :stop] for x in held)
        part = query[:, :, start:stop]
        outs.append(dense_attention(module, part, keys, values, shown[None, None], 0.0, {}, **options))
    return torch.cat(outs, 1)


def through_bits(key: Keys, value: Values, bits: int) -> tuple[Keys, Values]:
    """Keys and values of all full pages as cold pages give them back, and what follows them as it is."""
    pages = key.shape[2] // PAGE_SIZE
    if not pages:
        return key, value
    full = [x[:, :, : pages * PAGE_SIZE].unflatten(2, (pages, PAGE_SIZE)) for x in (key, value)]
    codes, scales = quantise_page(full[0], full[1], bits)
    found = dequantise_page(codes, scales, bits, PAGE_SIZE, (key.shape[-1], value.shape[-1]))
    first, second = (
        torch.cat([stored.flatten(2, 3).to(whole.dtype), whole[:, :, pages * PAGE_SIZE :]], 2)
        for whole, stored in zip((key, value), found, strict=True)
    )
    return first, second
