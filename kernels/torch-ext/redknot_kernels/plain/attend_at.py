"""Attention of tokens at any places of a text whose keys and values lie in order."""

import torch

from .attend import add_sink_logit, attend, merge
from .pages import take_heads

# Queries that are attended at once, and how far apart they stand at the most where others stand between them.
_QUERIES, _SPAN = 256, 1024


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
    chunks = list(_chunks(positions.tolist()))
    for part, members in (*kinds, *rules.local_groups):
        key, value = take_heads(keys, members), take_heads(values, members)
        for start, stop in chunks:
            asking, where = take_heads(grouped[:, :, :, start:stop], members).flatten(1, 2), positions[start:stop]
            found, lse = _attended(asking, key, value, where, part.take((0,)), scale=scale, softcap=softcap)
            found = add_sink_logit(found, lse, None if sinks is None else sinks[list(members)].flatten())
            out[:, start:stop, list(members)] = found.unflatten(1, (len(members), group)).permute(0, 3, 1, 2, 4)
    return out.flatten(2, 3)


def _attended(query, keys, values, where, rule, **options):
    """Attention, and its log-sum-exp, of tokens that stand near each other; all heads have one rule."""
    first, last = int(where[0]), int(where[-1])
    if min(rule.window[0], rule.reach) > last:  # all that stands before is seen
        among = {"causal": True}
        if last - first >= len(where):
            among = {"mask": (torch.arange(first, last + 1, device=query.device) <= where[:, None])[None, None]}
        parts = [attend(query, keys[:, :, first : last + 1], values[:, :, first : last + 1], **among, **options)]
        if first:
            parts.append(attend(query, keys[:, :, :first], values[:, :, :first], **options))
        return merge(parts)
    low = max(first - min(rule.window[0], rule.reach) + 1, 0)
    sink = min(rule.sink[0], low)
    places = torch.cat([torch.arange(a, b, device=query.device) for a, b in ((0, sink), (low, last + 1))])
    seen = rule.visible(where[None], places[None])[None]
    cut = (torch.cat([x[:, :, :sink], x[:, :, low : last + 1]], 2) for x in (keys, values))
    return attend(query, *cut, mask=seen, **options)


def _chunks(positions):
    """Tokens that follow each other or stand near each other, at most `_QUERIES` together, as ranges."""
    start = 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or i - start == _QUERIES or positions[i] - positions[start] >= _SPAN:
            yield start, i
            start = i
