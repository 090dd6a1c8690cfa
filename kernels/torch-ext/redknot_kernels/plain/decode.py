"""Attention of a few new tokens over pages: those that hold them already, or that take them in the same step."""

from functools import lru_cache

import torch

from ..rules import UNBOUNDED
from .attend import add_sink_logit, attend, merge
from .cold import attend_stored, cool
from .pages import append_hot, gather, head_index, take_heads

# Bytes of keys and values gathered at once: they stay in the processor's cache, and under the size from which the
# allocator asks the system for fresh memory on every call.
_CHUNK_BYTES = 16 << 20


def step(query, pages, k_new, v_new, table, counts, real, rules, *, scale, softcap=None, s_aux=None, cold=None):
    """Writes new tokens to the ends of their rows, attends them over the rows, and counts them.

    Args:
        query: `[batch, query heads, tokens, dim]`, with `tokens <= rules.slack`.
        pages: `Pages`, written in place.
        k_new, v_new: `[batch, KV heads, tokens, dim]`.
        table: `[batch, KV heads, columns]`, with room for the new tokens.
        counts: `[batch + 1]` of int32, advanced in place: the tokens of each sequence, and last the slots of all,
            padding included.
        real: `[batch, tokens]` of bool, which tokens are no padding; `None` if all. Padding is neither written nor
            seen, and what it gets as output means nothing.
        (others): As in `decode`. Pages that leave the hot tail with this step grow cold after it.

    Returns:
        `[batch, tokens, query heads, value dim]`, contiguous.
    """
    tokens, options = query.shape[2], {"scale": scale, "softcap": softcap, "s_aux": s_aux}
    if real is None:
        append_hot(pages, k_new, v_new, table, counts[:-1], rules)
        counts += tokens
        out = decode(query, pages, table, counts[:-1], rules, cold=cold, **options)
        if cold is not None:
            cool(pages, cold, table, counts[:-1], rules)
        return out
    out = query.new_zeros(len(query), tokens, query.shape[1], v_new.shape[-1])
    for b, flags in enumerate(real):
        where, one = flags.nonzero()[:, 0], slice(b, b + 1)
        if len(where):
            part, k, v = (x[one].index_select(2, where) for x in (query, k_new, v_new))
            append_hot(pages, k, v, table[one], counts[one], rules)
            counts[one] += len(where)
            held = None if cold is None else cold._replace(table=cold.table[one], counts=cold.counts[one])
            out[one, where] = decode(part, pages, table[one], counts[one], rules, cold=held, **options)
    counts[-1] += tokens
    if cold is not None:
        cool(pages, cold, table, counts[:-1], rules)
    return out


def decode(query, pages, table, lengths, rules, *, scale, softcap=None, s_aux=None, cold=None):
    """Attends the last tokens of every row over the whole row.

    Args:
        query: `[batch, query heads, tokens, dim]`; the queries of a sequence stand at its last positions.
        pages: `Pages`.
        table: `[batch, KV heads, columns]`, the pages of the rows.
        lengths: `[batch]`, tokens in the rows, the new ones included; 0 gives an output of 0.
        rules: `HeadRules` of the KV heads; `tokens <= rules.slack`.
        scale, softcap: Of the scores.
        s_aux: `[query heads]`, one more logit in each head's softmax.
        cold: `Cold`, where heads are stored.

    Returns:
        `[batch, tokens, query heads, value dim]`, contiguous.
    """
    heads = rules.heads
    grouped = query.view(len(query), heads, -1, *query.shape[2:])
    out = query.new_empty(0)
    sinks = None if s_aux is None else s_aux.unflatten(0, (heads, -1))
    kinds = (0, rules.global_heads), (0, rules.local_heads), *rules.stored_groups
    for bits, part in ((bits, part) for bits, part in kinds if part):
        asking, options = take_heads(grouped, part), {"scale": scale, "softcap": softcap}
        if bits:
            found, lse = attend_stored(asking, pages, cold, table, lengths, rules, part, bits, **options)
        else:
            rows = take_heads(table, part)
            found, lse = attend_pages(asking, pages, rows, lengths, None, rules.take(part), **options)
        if sinks is not None:
            logits = sinks[list(part)].flatten()
            found = add_sink_logit(found.flatten(1, 2), lse.flatten(1, 2), logits).view_as(found)
        if len(part) == heads:
            out = found
        else:
            if not len(out):
                out = found.new_empty(len(found), heads, *found.shape[2:])
            out.index_copy_(1, head_index(part, out.device), found)
    if query.shape[2] == 1:
        return out.reshape(len(out), 1, -1, out.shape[-1])
    return out.flatten(1, 2).transpose(1, 2).contiguous()


def attend_pages(query, pages, table, lengths, start, rules, *, scale, softcap=None):
    """Attends queries at positions `start`, `start + 1`, ... over rows of `lengths` tokens.

    Args:
        query: `[batch, KV heads, group, tokens, dim]`.
        start: `[batch]`, position of the first query; may lie behind the row's end. `None`: the queries are the last
            tokens of the rows.
        (others): As in `decode`, for heads that are all global or all local.

    Returns:
        Output `[batch, KV heads, group, tokens, value dim]` and log-sum-exp `[batch, KV heads, group, tokens]`.
    """
    batch, heads, group, tokens, _ = query.shape
    size = pages.page_size
    ends = lengths.tolist()
    starts = [end - tokens for end in ends] if start is None else start.tolist()
    level, longest = len(set(ends)) == 1, max(ends)
    columns = min(-(-longest // size), max(rules.max_pages))
    if columns == 0:
        return query.new_zeros(*query.shape[:-1], pages.values.shape[-1]), query.new_full(
            query.shape[:-1], -torch.inf, dtype=torch.float32
        )
    page_bytes = batch * heads * sum(x[:1].nbytes for x in pages)
    chunk = max(1, _CHUNK_BYTES // page_bytes)
    folded, alone = query.flatten(2, 3), chunk >= columns and longest == max(starts) + tokens
    parts = []
    for column in range(0, columns, chunk):
        count = min(chunk, columns - column)
        rows = table if count == table.shape[2] else table.narrow(2, column, count)
        k, v = gather(pages, rows)
        first, end = column * size, column * size + k.shape[2]
        mask = None
        if rules.global_heads and (level or min(ends) >= end) and min(longest, end) <= min(starts) + 1:
            held = min(longest, end) - first  # every query sees every token here
            if held < k.shape[2]:
                k, v = k.narrow(2, 0, held), v.narrow(2, 0, held)
        else:
            mask = (mask_of_one if tokens == 1 else _mask)(
                first, end, tuple(ends), tuple(starts), tokens, rules, query.device
            )
            mask = mask.to(query.dtype).unsqueeze(2)  # one for the group, of which all stand at the same positions
            mask = mask.expand(-1, -1, 1 if tokens == 1 else group, -1, -1).flatten(2, 3)
        parts.append(attend(folded, k, v, scale=scale, mask=mask, softcap=softcap, alone=alone))
    out, lse = merge(parts)
    return out.view(batch, heads, group, tokens, -1), lse.view(batch, heads, group, tokens)


def _mask(first, end, lengths, starts, tokens, rules, device):
    """What each query sees of the slots from `first` to `end`, as 0 or -inf: `[batch, 1 or heads, tokens, slots]`."""
    if len(set(zip(rules.window, rules.sink, rules.ring))) == 1:
        rules = rules.take((0,))
    lengths, starts = (torch.tensor(x, device=device)[:, None, None] for x in (lengths, starts))
    keys = rules.positions(torch.arange(first, end, device=device), lengths[:, 0, 0])
    keys = torch.where(keys < lengths, keys, UNBOUNDED)
    seen = rules.visible(starts + torch.arange(tokens, device=device), keys)
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)


# In a step of decoding, layers of equal rules ask for the same small mask.
mask_of_one = lru_cache(maxsize=16)(_mask)
