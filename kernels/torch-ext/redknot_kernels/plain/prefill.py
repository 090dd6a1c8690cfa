"""Attention of many new tokens: causal for global heads, a band and a sink for local ones, both with a past."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Optional

import torch
import torch.nn.functional as F

from ..rules import UNBOUNDED
from .attend import add_sink_logit, attend, merge
from .cold import lay_out
from .decode import attend_pages
from .pages import Pages, gather_tokens, take_heads

# Bytes of keys and values laid out at once for the bands of a local head.
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Context:
    """What the rows held before a step, as far as the step's tokens can see it.

    Attributes:
        length: Tokens of every row.
        pages, table: Where the rows are; global heads read their past from them.
        bands: For each of `rules.local_groups` the keys and the values at positions 0 to `sink`, followed by those
            from `length - window + 1` on, `[batch, heads of the group, tokens, dim]`. Copies, since the step
            overwrites the pages.
        laid: What stored rows held, cold pages dequantised: `Pages` of copies and their table; `None` without any.
    """

    length: int
    pages: Pages
    table: torch.Tensor
    bands: tuple
    laid: Optional[tuple] = None


def read_context(pages, table, length, rules, cold=None, lay_out=lay_out):
    """Reads the past of rows of `length` tokens, before a step writes to their pages.

    `lay_out` is the implementation's, for stored rows; `cold` are their cold pages.
    """
    bands = []
    for part, heads in rules.local_groups:
        bands.append(gather_tokens(pages, take_heads(table, heads), _remembered(part, length, table.device)))
    laid = lay_out(pages, cold, table, length, rules) if rules.stored_heads else None
    return Context(length, pages, table, tuple(bands), laid)


@lru_cache(maxsize=256)  # layers of equal rules ask for the same, in the same places
def _remembered(rules, length, device):
    """Slots, in rows of `length` tokens, of the sinks and of what the next query sees behind them."""
    sinks = torch.arange(min(rules.sink[0], length), device=device)
    band = torch.arange(max(length - rules.window[0] + 1, 0), length, device=device)
    return rules.slots(torch.cat([sinks, band]).expand(1, 1, -1))


def prefill(query, k_new, v_new, context, rules, *, scale, softcap=None, s_aux=None):
    """Attends new tokens over themselves and over a past, all rows of one length.

    Args:
        query: `[batch, query heads, tokens, dim]`.
        k_new, v_new: `[batch, KV heads, tokens, dim]`.
        context: The past, from `read_context`; `None` if there is none.
        rules: `HeadRules` of the KV heads.
        scale, softcap: Of the scores.
        s_aux: `[query heads]`, one more logit in each head's softmax.

    Returns:
        `[batch, tokens, query heads, value dim]`, contiguous. Time is linear in tokens for local heads.
    """
    batch, query_heads, tokens, _ = query.shape
    heads = rules.heads
    group = query_heads // heads
    grouped = query.unflatten(1, (heads, group))
    sinks = None if s_aux is None else s_aux.unflatten(0, (heads, group))
    full = tuple(
        h for h, w in enumerate(rules.window) if _sees_all(w, tokens, context) and h not in rules.stored_heads
    )
    work, kinds = [], ((full, context), *((h, _laid(context)) for _, h in rules.stored_groups))
    for h, past in (kind for kind in kinds if kind[0]):
        as_global = rules.as_seen.take(h)
        work.append((h, lambda q, k, v, h=h, past=past, r=as_global: _causal(q, k, v, past, r, h, scale, softcap)))
    for i, (part, members) in enumerate(rules.local_groups):
        if members[0] not in full:
            past = (0, None) if context is None else (context.length, context.bands[i])
            work.append((members, lambda q, k, v, p=part, b=past: _banded(q, k, v, b, p, scale, softcap)))
    out = query.new_empty(batch, tokens, heads, group, v_new.shape[-1])
    for members, run in work:
        found, lse = run(
            take_heads(grouped, members).flatten(1, 2), take_heads(k_new, members), take_heads(v_new, members)
        )
        found = add_sink_logit(found, lse, None if sinks is None else sinks[list(members)].flatten())
        found = found.unflatten(1, (len(members), group)).permute(0, 3, 1, 2, 4)
        if len(members) == heads:
            return found.flatten(2, 3).contiguous()
        out[:, :, list(members)] = found
    return out.flatten(2, 3)


def _laid(context):
    """The context of stored heads."""
    return None if context is None else replace(context, pages=context.laid[0], table=context.laid[1])


def _sees_all(window, tokens, context):
    """Whether a head of this window is as good as global for this step."""
    return window >= UNBOUNDED or (context is None and tokens <= window)


def _causal(query, k_new, v_new, context, rules, heads, scale, softcap):
    new = attend(query, k_new, v_new, scale=scale, causal=True, softcap=softcap)
    if context is None or context.length == 0:
        return new
    lengths = torch.full((len(query),), context.length, device=query.device)
    rows = take_heads(context.table, heads)
    out, lse = attend_pages(
        query.unflatten(1, (len(heads), -1)), context.pages, rows, lengths,
        lengths, rules, scale=scale, softcap=softcap,
    )  # fmt: skip
    return merge([new, (out.flatten(1, 2), lse.flatten(1, 2))])


def _banded(query, k_new, v_new, past, rules, scale, softcap):
    """Blocks of queries, each over the sink and over the keys from its first query's window to its last query."""
    batch, _, tokens, _ = query.shape
    length, stored = past
    window, sink = min(rules.window[0], length + tokens), min(rules.sink[0], length + tokens)
    rules = replace(rules.take((0,)), window=(window,), sink=(sink,))  # a longer window sees no more than there is
    block = _block(window, tokens)
    blocks = -(-tokens // block)
    sinks, bands = zip(*(_sink_and_band(new, s, length, sink) for new, s in _pairs((k_new, v_new), stored)))
    before = (window - 1) - (bands[0].shape[2] - tokens)  # room where the sequence begins inside the first window
    bands = [
        F.pad(band, (0, 0, before, blocks * block - tokens)).unfold(2, window - 1 + block, block) for band in bands
    ]
    query = F.pad(query, (0, 0, 0, blocks * block - tokens)).unflatten(2, (blocks, block))
    step = max(1, _CHUNK_BYTES // (bands[0][:, :, 0].numel() * query.element_size() * 2))
    outs, lses = [], []
    for first, stop, mask in _masks(length, block, blocks, step, rules):
        mask = mask.to(query.device)
        q = query[:, :, first:stop].transpose(1, 2).flatten(0, 1)
        k, v = (_blocks(s, band[:, :, first:stop]) for s, band in zip(sinks, bands))
        mask = mask if len(mask) == 1 else mask.repeat(batch, 1, 1, 1)
        out, lse = attend(q, k, v, scale=scale, mask=mask, softcap=softcap)
        outs.append(out.unflatten(0, (batch, -1)).transpose(1, 2))
        lses.append(lse.unflatten(0, (batch, -1)).transpose(1, 2))
    out, lse = torch.cat(outs, 2).flatten(2, 3), torch.cat(lses, 2).flatten(2, 3)
    return out[:, :, :tokens], lse[:, :, :tokens]


def _block(window, tokens):
    """Queries of a block: about the window, so that at most half of the scores are thrown away."""
    return min(max(64, 1 << (window - 1).bit_length() >> 1), 512, max(16, 1 << (tokens - 1).bit_length()))


def _pairs(new, stored):
    return zip(new, (None, None) if stored is None else stored)


def _sink_and_band(new, stored, length, sink):
    """Keys (or values) of the first `sink` positions, and of the positions the band starts from."""
    if stored is None:
        return new[:, :, :sink], new
    held = min(sink, length)
    sinks = stored[:, :, :held]
    if held < sink:  # the sequence is still shorter than its sink: the rest of it is in this step
        sinks = torch.cat([sinks, new[:, :, : sink - held]], 2)
    return sinks, torch.cat([stored[:, :, held:], new], 2)


def _blocks(sinks, band):  # [batch, heads, sink, dim], [batch, heads, blocks, dim, span]
    """Lays out the keys of every block: `[batch * blocks, heads, sink + span, dim]`."""
    band = band.permute(0, 2, 1, 4, 3)
    if sinks.shape[2]:
        sinks = sinks.unsqueeze(1).expand(-1, band.shape[1], -1, -1, -1)
        band = torch.cat([sinks, band], 3)
    return band.flatten(0, 1)


def _masks(length, block, blocks, step, rules):
    """Runs of blocks with their mask `[1 or blocks, 1, block, sink + span]`; one mask serves all blocks alike."""
    window, sink, reach = rules.window[0], rules.sink[0], rules.reach
    start = lambda i: length + i * block  # noqa: E731
    kind = []
    for i in range(blocks):
        inside = start(i) - window + 1 >= sink  # the band is clear of the sequence's start
        near, far = start(i) + block <= reach, start(i) + 1 >= reach + sink  # every sink is within reach, or none
        kind.append(int(near) + 2 * int(far) + 1 if inside and (near or far) else 0)
    first = 0
    while first < blocks:
        stop = first + 1
        while stop < blocks and kind[stop] == kind[first] and stop - first < step:
            stop += 1
        shown = torch.arange(first, first + 1 if kind[first] else stop)
        yield first, stop, _block_masks(start(shown), block, rules)
        first = stop


def _block_masks(starts, block, rules):
    span, sink = rules.window[0] - 1 + block, rules.sink[0]
    queries = starts[:, None, None] + torch.arange(block)
    band = starts[:, None, None] - rules.window[0] + 1 + torch.arange(span)
    band = torch.where(band < sink, UNBOUNDED, band)  # the sinks stand apart, and nothing stands before the start
    keys = torch.cat([torch.arange(sink).expand(len(starts), 1, -1), band], -1)
    return rules.visible(queries, keys)
