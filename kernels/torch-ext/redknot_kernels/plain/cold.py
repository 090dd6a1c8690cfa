"""Rows that keep most of their tokens in cold pages: attending them, and letting the hot tail's end grow cold."""

from typing import NamedTuple, Optional

import torch

from ..rules import UNBOUNDED, HeadRules
from .attend import attend, merge
from .pages import Pages, append_hot, gather, place_hot, take_heads, token_index
from .quantise import ColdPages, dequantise_page, quantise_page

# Bytes of dequantised keys and values at once, as in decoding.
_CHUNK_BYTES = 16 << 20


class Cold(NamedTuple):
    """The cold pages of a layer's stored rows.

    Attributes:
        int8, int4: The pools, or `None` where no head stores that.
        table: `[batch, heads, columns]` of int32, the cold pages of every row, in the pool of its head.
        counts: `[batch, heads]` of int32, how many of them hold something; advanced in place.
    """

    int8: Optional[ColdPages]
    int4: Optional[ColdPages]
    table: torch.Tensor
    counts: torch.Tensor

    def pool(self, bits):
        """The pages in so many bits."""
        return self.int8 if bits == 8 else self.int4


def cool(pages, cold, table, lengths, rules, new=None):
    """Quantises the pages of stored rows that have left the hot tail, each once.

    Args:
        pages: `Pages`, of which the hot tails lie in.
        cold: `Cold`, whose pools and counts are written; the table has room.
        table: `[batch, heads, columns]`, the rows' own pages.
        lengths: `[batch]`, tokens in the rows, those of `new` included.
        rules: `HeadRules` of the heads.
        new: Keys and values of the last tokens, `[batch, heads, tokens, dim]`, which are not in the rows yet.
    """
    size = rules.page_size
    for bits, heads in rules.stored_groups:
        pool = cold.pool(bits)
        for b, length in enumerate(lengths.tolist()):
            target = rules.cold_pages(length)
            for h in heads:
                done = int(cold.counts[b, h])
                if done >= target:
                    continue
                positions = torch.arange((done + 1) * size, (target + 1) * size, device=table.device)
                found = _tokens(pages, table[b : b + 1, h : h + 1], rules.take((h,)), positions)
                if new is not None:
                    fresh = positions - (length - new[0].shape[2])
                    latest = (fresh >= 0)[:, None]
                    found = [
                        torch.where(latest, x[b, h].index_select(0, fresh.clamp(min=0)), y) for x, y in zip(new, found)
                    ]
                codes, scales = quantise_page(
                    found[0].unflatten(0, (-1, size)), found[1].unflatten(0, (-1, size)), bits
                )
                where = cold.table[b, h, done:target].long()
                pool.codes.index_copy_(0, where, codes)
                pool.scales.index_copy_(0, where, scales)
                cold.counts[b, h] = target


def _tokens(pages, table, rules, positions):
    """Keys and values `[tokens, dim]` of one row, at positions it still holds; of the others it does not matter."""
    where = token_index(table, rules.slots(positions[None, None]), rules.page_size).flatten()
    return [x.view(-1, x.shape[-1]).index_select(0, where) for x in pages]


def read_cold(cold, table, bits, page_size, dims):  # [batch, heads, columns] of the pool
    """Keys and values of cold pages, `[batch, heads, slots, dim]` in float32."""
    pool, flat = cold.pool(bits), table.reshape(-1)
    found = dequantise_page(pool.codes.index_select(0, flat), pool.scales.index_select(0, flat), bits, page_size, dims)
    return tuple(x.reshape(*table.shape[:2], -1, x.shape[-1]) for x in found)


def attend_stored(query, pages, cold, table, lengths, rules, heads, bits, *, scale, softcap=None):
    """Attends the last tokens of stored rows over hot and cold pages.

    Args:
        query: `[batch, stored heads, group, tokens, dim]`.
        pages, table, lengths, rules: As in `decode`, for all heads.
        cold: `Cold`.
        heads, bits: The stored heads that these are, of one storage.
        scale, softcap: Of the scores.

    Returns:
        Output `[batch, stored heads, group, tokens, value dim]` and log-sum-exp without the last dim.
    """
    part, size, tokens = rules.take(heads), rules.page_size, query.shape[3]
    counts, folded = take_heads(cold.counts, heads), query.flatten(2, 3).float()
    hot = take_heads(table, heads).narrow(2, 0, min(table.shape[2], max(part.max_pages)))
    keys, values = (x.float() for x in gather(pages, hot))
    position = part.positions(torch.arange(keys.shape[2], device=table.device), lengths)
    asked = lengths[:, None, None] - tokens + torch.arange(tokens, device=table.device)
    held = (position < size) | (position >= (counts[..., None] + 1) * size)  # of the rest the cold page speaks
    seen = part.visible(asked, torch.where(held & (position < lengths[:, None, None]), position, UNBOUNDED))
    seen = seen.unsqueeze(2).expand(-1, -1, query.shape[2], -1, -1).flatten(2, 3)
    keys, values = (x.masked_fill(~seen.any(2).unsqueeze(-1), 0) for x in (keys, values))
    parts = [attend(folded, keys, values, scale=scale, mask=seen, softcap=softcap)]
    dims, most = (keys.shape[-1], values.shape[-1]), int(counts.max())
    chunk = max(1, _CHUNK_BYTES // max(1, 4 * counts.numel() * size * sum(dims)))
    for column in range(0, most, chunk):
        columns = take_heads(cold.table, heads)[:, :, column : min(column + chunk, most)]
        keys, values = read_cold(cold, columns, bits, size, dims)
        index = column + torch.arange(keys.shape[2], device=table.device) // size
        seen = (index < counts[..., None]).unsqueeze(2)
        keys, values = (x.masked_fill(~seen.mT, 0) for x in (keys, values))
        parts.append(attend(folded, keys, values, scale=scale, mask=seen, softcap=softcap))
    out, lse = merge(parts)
    shape = query.shape[:-1]
    return out.view(*shape, -1).to(query.dtype), lse.view(shape)


def lay_out(pages, cold, table, length, rules):
    """The past of stored rows of `length` tokens as a long step reads it: whole pages, cold ones dequantised.

    Returns:
        `Pages` of copies in the pages' dtype, and a table of them, `[batch, heads, columns]`, in which only rows of
        stored heads have pages.
    """
    size, columns, device = rules.page_size, -(-length // rules.page_size), table.device
    batch, dims = len(table), tuple(x.shape[-1] for x in pages)
    laid, rows, first = [], torch.zeros(batch, rules.heads, columns, dtype=torch.int32, device=device), 0
    positions = torch.arange(columns * size, device=device).clamp(max=length - 1)
    for bits, heads in rules.stored_groups:
        count = batch * len(heads) * columns
        numbers = torch.arange(first, first + count, dtype=torch.int32, device=device)
        rows[:, list(heads)] = numbers.view(batch, len(heads), columns)
        first += count
        part = rules.take(heads)
        where = token_index(take_heads(table, heads), part.slots(positions[None, None]), size)
        hot = [x.view(-1, x.shape[-1]).index_select(0, where.flatten()).view(*where.shape, -1) for x in pages]
        counts, most = take_heads(cold.counts, heads), min(columns - 1, cold.table.shape[2])
        if most > 0:
            frozen = read_cold(cold, take_heads(cold.table, heads)[:, :, :most], bits, size, dims)
            is_cold = (torch.arange(most * size, device=device) // size < counts[..., None])[..., None]
            span = slice(size, (most + 1) * size)
            for x, y in zip(hot, frozen):
                x[:, :, span] = torch.where(is_cold, y.to(x.dtype), x[:, :, span])
        laid.append([x.reshape(count, size, -1) for x in hot])
    return Pages(*map(torch.cat, zip(*laid))), rows


def append(pages, k_new, v_new, table, lengths, rules, cold=None):
    """Writes a step's tokens behind the rows' ends; rows with a ring keep what it holds.

    Args:
        pages: `Pages`, written in place.
        k_new, v_new: `[batch, heads, tokens, dim]`. More tokens than `rules.slack` need rows of one length.
        table: `[batch, heads, columns]`, with room for the new tokens.
        lengths: `[batch]`, tokens in the rows before this step.
        rules: `HeadRules` of the heads.
        cold: `Cold`, where heads are stored: what leaves their hot tails with this step grows cold.
    """
    if cold is not None:  # first, since the ring may lose it
        cool(pages, cold, table, lengths + k_new.shape[2], rules, (k_new, v_new))
    append_hot(pages, k_new, v_new, table, lengths, rules)


def place(pages, keys, values, table, rules, kept, span, rotation=None, cold=None, write=place_hot, cool=cool):
    """Continues the rows of one sequence with a stored span of tokens, and turns the keys on the way.

    Of the span every head has some tokens stored, head by head in order. A row takes of them what its rule lets it
    keep once the sequence ends with the span: sinks, and what its ring holds. A stored row takes all of it.

    Args:
        pages: `Pages`, contiguous, written in place.
        keys, values: `[stored, dim]`.
        table: `[heads, columns]`, pages of the sequence's rows, with room for the span.
        rules: `HeadRules` of the heads.
        kept: Of each head the last tokens stored (`UNBOUNDED` for all), and the first ones beside them.
        span: Tokens of the span, how many of its first ones the rows hold already, and where it begins.
        rotation: How the key of each token of the span turns; `None` copies them.
        cold: `Cold` of this sequence, where heads are stored.
        write, cool: Of the implementation.
    """
    if cold is not None:
        (tokens, first, offset), size, heads = span, rules.page_size, rules.heads
        columns = -(-tokens // size)
        laid = Pages(*(x.new_zeros(heads * columns, size, x.shape[-1]) for x in pages))
        own = torch.arange(heads * columns, dtype=torch.int32, device=table.device).view(heads, columns)
        unbounded = (UNBOUNDED,) * heads
        all_of_it = HeadRules(unbounded, (0,) * heads, unbounded, size)
        write(laid, keys, values, own, all_of_it, kept, (tokens, first, 0), rotation)
        new = [x.view(1, heads, columns * size, -1)[:, :, first:tokens] for x in laid]
        lengths = torch.full((1,), offset + tokens, dtype=torch.int32, device=table.device)
        cool(pages, cold, table[None], lengths, rules, new)
    write(pages, keys, values, table, rules, kept, span, rotation)
