"""Attention of tokens at any places of a text whose keys and values lie in order."""

import torch

from .attend import add_sink_logit, attend
from .pages import take_heads

# Queries that are attended at once, under a mask of their own.
_QUERIES = 256


def attend_at(query, keys, values, positions, rules, *, scale, softcap=None, s_aux=None):
    """Attends some tokens of a text over what stands before them; the time is linear in tokens for local heads.

    Args:
        query: `[batch, query heads, tokens, dim]`.
        keys, values: `[batch, KV heads, text, dim]`, those of the tokens included. Finite also where no head looks.
        positions: `[tokens]` of int64, where the tokens stand, in ascending order; the same for the batch.
        rules: `HeadRules` of the KV heads, of which windows, sinks and reach count.
        scale, softcap: Of the scores.
        s_aux: `[query heads]`, one more logit in each head's softmax.

    Returns:
        `[batch, tokens, query heads, value dim]`, contiguous.
    """
    batch, query_heads, tokens, _ = query.shape
    heads, group = rules.heads, query_heads // rules.heads
    kinds = [(rules.take(rules.global_heads), rules.global_heads)] if rules.global_heads else []
    grouped = query.unflatten(1, (heads, group))
    sinks = None if s_aux is None else s_aux.unflatten(0, (heads, group))
    out = query.new_empty(batch, tokens, heads, group, values.shape[-1])
    for start, stop in _runs(positions.tolist()):
        where = positions[start:stop]
        for part, members in (*kinds, *rules.local_groups):
            sink, low, high = _seen(part, int(where[0]), int(where[-1]))
            key, value = (_cut(x, members, sink, low, high) for x in (keys, values))
            places = torch.cat([torch.arange(sink, device=key.device), torch.arange(low, high, device=key.device)])
            seen = part.take((0,)).visible(where[None], places[None])[None]
            asking = take_heads(grouped[:, :, :, start:stop], members).flatten(1, 2)
            found, lse = attend(asking, key, value, scale=scale, mask=seen, softcap=softcap)
            found = add_sink_logit(found, lse, None if sinks is None else sinks[list(members)].flatten())
            out[:, start:stop, list(members)] = found.unflatten(1, (len(members), group)).permute(0, 3, 1, 2, 4)
    return out.flatten(2, 3)


def _cut(text, members, sink, low, high):  # [batch, heads, text, dim] -> [batch, members, sink + high - low, dim]
    band = take_heads(text[:, :, low:high], members)
    return torch.cat([take_heads(text[:, :, :sink], members), band], 2) if sink else band


def _runs(positions):
    """Tokens that follow each other, at most `_QUERIES` together, as ranges."""
    start = 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or i - start == _QUERIES or positions[i] != positions[i - 1] + 1:
            yield start, i
            start = i


def _seen(rules, first, last):
    """What queries from position `first` to `last` see: sinks up to a position, and a band of positions."""
    low = max(first - min(rules.window[0], rules.reach) + 1, 0)
    return min(rules.sink[0], low), low, last + 1
