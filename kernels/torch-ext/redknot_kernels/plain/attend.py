"""Softmax attention that also returns its log-sum-exp, so that parts of the keys can be attended apart and merged."""

import torch
import torch.nn.functional as F

# Scores held at once where no fused kernel applies, in elements.
_MAX_SCORES = 1 << 24


def attend(query, key, value, *, scale, mask=None, causal=False, softcap=None, alone=False):
    """Attends every query over every visible key.

    Args:
        query: `[batch, query heads, tokens, dim]`.
        key: `[batch, KV heads, keys, dim]`; query heads are a multiple of KV heads and share them in groups.
        value: `[batch, KV heads, keys, value dim]`.
        scale: Factor of the scores.
        mask: Bool (True = visible) or float (added to the scores), `[batch, query heads, tokens, keys]` or broadcast
            to it.
        causal: Query t sees keys 0 to t; tokens == keys.
        softcap: Bound c of the scores, as `c * tanh(score / c)`.
        alone: The result is not merged with others, so the log-sum-exp of queries that see nothing does not matter.

    Returns:
        The output `[batch, query heads, tokens, value dim]` in the query's dtype, and the log-sum-exp of the scores
        `[batch, query heads, tokens]` in float32 or wider. A query that sees nothing gets 0 and -inf.
    """
    if query.device.type == "cpu" and softcap is None:
        return _attend_fused_cpu(query, key, value, scale, mask, causal, alone)
    return _attend_plain(query, key, value, scale, mask, causal, softcap)


def merge(parts):
    """Merges attention over disjoint sets of keys: a list of (output, log-sum-exp), in float32."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part_lse for _, part_lse in parts])
    total = torch.logsumexp(lse, 0)
    weight = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))
    out = torch.stack([part * w.unsqueeze(-1) for (part, _), w in zip(parts, weight)]).sum(0)
    return out.to(parts[0][0].dtype), total


def merge_stacked(out, lse):  # [parts, ..., dim], [parts, ...] -> [..., dim]
    """The output of `merge` for parts that lie in one tensor; as few steps for many parts as for two."""
    weight = lse.softmax(0).nan_to_num(0.0)  # what sees no key at all is zero
    return (out * weight.unsqueeze(-1)).sum(0)


def add_sink_logit(out, lse, s_aux):  # [batch, heads, tokens, dim], [batch, heads, tokens], [heads]
    """Adds one more logit per query head to the softmax, with no value behind it (the attention sinks of GPT-OSS)."""
    if s_aux is None:
        return out
    return out * torch.sigmoid(lse - s_aux[:, None].to(lse.dtype)).unsqueeze(-1).to(out.dtype)


def _attend_fused_cpu(query, key, value, scale, mask, causal, alone):
    dim, value_dim = query.shape[-1], value.shape[-1]
    if dim != value_dim:  # the kernel wants equal dims; zeros change neither the scores nor the kept outputs
        wide = max(dim, value_dim)
        query, key, value = (F.pad(x, (0, wide - x.shape[-1])) for x in (query, key, value))
    blind = None
    if mask is not None and mask.dtype == torch.bool:
        blind = None if alone else ~mask.any(-1)
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        blind = None if alone else (mask == -torch.inf).all(-1)
        mask = mask.to(query.dtype)
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(  # pyright: ignore[reportPrivateImportUsage]
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    if blind is not None:  # the kernel says 0 there, which a merge would take for a real sum
        lse = lse.masked_fill(blind, -torch.inf)
    return (out if dim == value_dim else out[..., :value_dim]), lse


def _attend_plain(query, key, value, scale, mask, causal, softcap):
    batch, query_heads, tokens, _ = query.shape
    heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, heads, query_heads // heads, tokens, -1)
    if mask is not None:
        mask = mask.unsqueeze(2) if mask.shape[1] in (1, heads) else mask.unflatten(1, (heads, -1))
    step = max(1, _MAX_SCORES // max(1, batch * query_heads * keys))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = key.to(wide).unsqueeze(2), value.to(wide).unsqueeze(2)
    outs, lses = [], []
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        scores = grouped[..., start:stop, :].to(wide) @ key.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            rows = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
            scores = scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows
        if causal:
            future = torch.arange(keys, device=key.device) > torch.arange(start, stop, device=key.device)[:, None]
            scores = scores.masked_fill(future, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
        outs.append((weights @ value).to(query.dtype))
        lses.append(lse)
    out = torch.cat(outs, -2).reshape(batch, query_heads, tokens, -1)
    return out, torch.cat(lses, -1).reshape(batch, query_heads, tokens)
