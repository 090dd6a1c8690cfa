"""Ordinary attention: what a model loaded with `"redknot"` does without a RedKnotCache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .mask import PaddingMask

Query = Float[Tensor, "batch query_heads tokens key_dim"]
Output = Float[Tensor, "batch tokens query_heads value_dim"]


def dense_attention(  # noqa: PLR0913 - what transformers passes
    module: nn.Module,
    query: Query,
    key: Float[Tensor, "batch heads keys key_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
    *,
    scale: float,
    softcap: float | None,
    s_aux: Float[Tensor, " query_heads"] | None,
) -> Output:
    """Ordinary attention, differentiable: what the model does without a RedKnotCache."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = kwargs.get("sliding_window") or getattr(mask, "window", None)
    tokens, keys = query.shape[2], key.shape[2]
    if isinstance(mask, PaddingMask) or mask is None:
        flags = None if mask is None or mask.whole or bool(mask.plain().all()) else mask.plain()
        reach = keys if window is None else min(window, keys)
        if causal and (flags is not None or reach < keys or (tokens != keys and tokens > 1)):
            q = torch.arange(keys - tokens, keys, device=query.device)[:, None]
            k = torch.arange(keys, device=query.device)
            seen = (k <= q) & (k > q - reach)
            flags = seen[None, None] if flags is None else flags & seen
        causal, mask = causal and flags is None and tokens > 1, flags
    else:
        causal = False
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous()
    weights = _weights(query, key, mask, causal, scale, softcap, s_aux)
    weights = F.dropout(weights, dropout) if dropout else weights
    out = weights.unflatten(1, (key.shape[1], -1)) @ value.unsqueeze(2)
    return out.flatten(1, 2).transpose(1, 2).contiguous()


def _weights(
    query: Query,
    key: Float[Tensor, "batch heads keys key_dim"],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    s_aux: Float[Tensor, " query_heads"] | None,
) -> Float[Tensor, "batch query_heads tokens keys"]:
    scores = (query.unflatten(1, (key.shape[1], -1)) @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        extra = s_aux[None, :, None, None].expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, extra], -1)
    return scores.float().softmax(-1).to(query.dtype)[..., : key.shape[2]]
