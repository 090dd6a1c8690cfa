"""Moving tokens in and out of pages.

A page holds `page_size` tokens of one KV head. `table` lists the pages of every row; entries past a row's end may hold
any valid page.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from .rotation import Rotation, rotate


class Pages(NamedTuple):
    """The pages of a pool; a table says whose they are.

    Attributes:
        keys: `[pages, page_size, dim]`.
        values: `[pages, page_size, value dim]`.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def device(self):
        """Where they are."""
        return self.keys.device

    @property
    def page_size(self):
        """Tokens of a page."""
        return self.keys.shape[1]


def append_hot(pages, k_new, v_new, table, lengths, rules):
    """Writes a step's tokens behind the rows' ends, as `append` does, but nothing grows cold."""
    tokens = k_new.shape[2]
    if tokens <= rules.slack:
        columns, slots = _ends(rules, tuple(lengths.tolist()), tokens, lengths.device)
        where = torch.add(slots, table.gather(2, columns), alpha=pages.page_size)
        _write(pages, k_new, v_new, where)
        return
    length = int(lengths[0])
    positions = length + torch.arange(tokens, device=lengths.device)
    if rules.global_heads:
        part = rules.take(rules.global_heads)
        _append_kept(pages, k_new, v_new, table, part, rules.global_heads, positions)
    stored = [(rules.take(group), group) for _, group in rules.stored_groups]
    for part, group in (*rules.local_groups, *stored):
        kept = (positions < part.sink[0]) | (positions >= length + tokens - part.ring[0])
        _append_kept(pages, k_new, v_new, table, part, group, positions[kept])


def _append_kept(pages, k_new, v_new, table, rules, heads, positions):
    first = positions[-1] + 1 - k_new.shape[2]  # the last token of a step is always kept
    k, v, rows = (take_heads(x, heads) for x in (k_new, v_new, table))
    if len(positions) < k_new.shape[2]:
        k, v = (x.index_select(2, positions - first) for x in (k, v))
    slots = rules.slots(positions.expand(len(table), 1, -1))
    _write(pages, k, v, token_index(rows, slots, pages.page_size))


@lru_cache(maxsize=16)  # in a step of decoding, layers of equal rules ask for the same
def _ends(rules, lengths, tokens, device):
    """Column and slot in its page of the next tokens of every row, each `[batch, heads, tokens]`."""
    positions = torch.tensor(lengths, device=device).view(-1, 1, 1) + torch.arange(tokens, device=device)
    slots = rules.slots(positions).expand(-1, rules.heads, -1)
    return slots // rules.page_size, slots % rules.page_size


def _write(pages, k_new, v_new, where):
    where = where.flatten()
    for part, new in zip(pages, (k_new, v_new)):
        part.view(-1, part.shape[-1]).index_copy_(0, where, new.reshape(-1, new.shape[-1]))


def gather(pages, table):  # Pages, [batch, heads, columns] -> keys and values, [batch, heads, slots, dim]
    """Reads whole pages of every row, in slot order."""
    batch, heads, columns = table.shape
    found = (x.index_select(0, table.reshape(-1)) for x in pages)
    return tuple(x.view(batch, heads, columns * pages.page_size, x.shape[-1]) for x in found)


def gather_tokens(pages, table, slots):  # ..., [batch, heads, tokens] -> keys and values, [batch, heads, tokens, dim]
    """Reads single slots of every row."""
    where = token_index(table, slots, pages.page_size)
    return read_tokens(pages, where)


def read_tokens(pages, where):  # Pages, [...] -> keys and values, [..., dim]
    """Reads tokens by their places in the pool seen as one run of tokens."""
    flat = where.flatten()
    return tuple(x.view(-1, x.shape[-1]).index_select(0, flat).view(*where.shape, x.shape[-1]) for x in pages)


def scatter_tokens(pages, table, slots, keys, values):  # ..., [batch, heads, tokens], [batch, heads, tokens, dim]
    """Writes single slots of every row, in place."""
    _write(pages, keys, values, token_index(table, slots, pages.page_size))


def place_hot(pages, keys, values, table, rules, kept, span, rotation=None):
    """Continues the rows of one sequence with a stored span of tokens, as `place` does, but nothing grows cold."""
    source, token, head, column, slot = _placed(rules, kept, span, keys.device)
    keys, values = keys.index_select(0, source), values.index_select(0, source)
    if rotation is not None:
        cos, sin = rotation.cos.index_select(0, token), rotation.sin.index_select(0, token)
        keys = rotate(keys, Rotation(cos, sin, rotation.interleaved))
    _write(pages, keys, values, torch.add(slot, table[head, column], alpha=pages.page_size))


@lru_cache(maxsize=64)  # many layers have the same rules
def _placed(rules, kept, span, device):
    """Of each stored token that goes to a row: where it is stored, which it is, its head, column and slot."""
    tokens, first, offset = span
    found, stored = [], 0
    for head, (window, sink) in enumerate(zip(*kept)):
        has = torch.arange(tokens)
        if sink + window < tokens:
            has = torch.cat([has[:sink], has[tokens - window :]])
        since = offset + max(int(has[sink]) if len(has) < tokens else 0, tokens - rules.ring[head])
        position = offset + has
        taken = ((has >= first) & ((position < rules.sink[head]) | (position >= since))).nonzero()[:, 0]
        slot = rules.take((head,)).slots(position[None, taken])[0]
        page = slot // rules.page_size, slot % rules.page_size
        found.append((stored + taken, has[taken], torch.full_like(taken, head), *page))
        stored += len(has)
    return tuple(torch.cat(part).to(device) for part in zip(*found))


def copy_pages(pages, source, target):
    """Copies whole pages inside a pool, in place."""
    for part in pages:
        part.index_copy_(0, target, part.index_select(0, source))


def token_index(table, slots, page_size):  # [batch, heads, columns], [batch, heads, tokens] -> the same
    """Index of each slot in the pool seen as one run of tokens."""
    slots = slots.expand(*table.shape[:2], -1)
    columns = slots // page_size
    return torch.add(slots, table.gather(2, columns) - columns, alpha=page_size)


def take_heads(tensor, heads):
    """The given heads of `[batch, heads, ...]`, in ascending order; without a copy where they lie side by side."""
    if len(heads) == heads[-1] - heads[0] + 1:
        return tensor.narrow(1, heads[0], len(heads))
    return tensor.index_select(1, head_index(heads, tensor.device))


@lru_cache(maxsize=4096)
def head_index(heads, device):
    """The heads as a tensor, for indexing."""
    return torch.tensor(heads, device=device)
