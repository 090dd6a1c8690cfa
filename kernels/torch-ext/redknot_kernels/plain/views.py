"""Rows whose pages follow each other, read and written as plain tensors: a token then costs no copy of the past."""

from functools import lru_cache
from typing import NamedTuple

import torch

from .attend import add_sink_logit, attend, merge
from .decode import mask_of_one


class Piece(NamedTuple):
    """Some slots of rows.

    Attributes:
        start: The first of them.
        keys, values: `[batch, heads, slots, dim]`, views into the pages.
    """

    start: int
    keys: torch.Tensor
    values: torch.Tensor


class RowView(NamedTuple):
    """The rows of heads with one rule.

    Attributes:
        heads: Which KV heads, in order.
        pieces: All of their slots, in order: one piece, or a few where a fork goes on elsewhere.
    """

    heads: tuple
    pieces: tuple


def view_rows(pages, first, apart, columns):
    """The rows `[batch, heads]` of a pool `[pages, page_size, dim]` as a view `[batch, heads, slots, dim]`.

    Args:
        pages: The pool.
        first: Page at which the first row begins.
        apart: Number of sequences and of heads, each with the pages from one to the next.
        columns: Pages of each row.
    """
    (batch, between_sequences), (heads, between_heads) = apart
    _, size, dim = pages.shape
    page = size * dim
    shape, strides = (batch, heads, columns * size, dim), (between_sequences * page, between_heads * page, dim, 1)
    return pages.as_strided(shape, strides, pages.storage_offset() + first * page)


def step_in_views(query, k_new, v_new, views, length, rules, *, scale, softcap=None, s_aux=None):
    """Writes one token of every sequence behind rows of `length` tokens, and attends it over them.

    Args:
        query: `[batch, query heads, 1, dim]`.
        k_new, v_new: `[batch, KV heads, 1, dim]`.
        views: A `RowView` for each kind of head, written in place; all heads together, each once.
        length: Tokens of every row before.
        rules: `HeadRules` of the KV heads.
        scale, softcap, s_aux: As in `decode`.

    Returns:
        `[batch, 1, query heads, value dim]`, contiguous.
    """
    order = _order(tuple(view.heads for view in views), query.device)
    new = query.view(len(query), rules.heads, -1, query.shape[-1]), k_new.squeeze(2), v_new.squeeze(2)
    if order is None:
        given = [new]
    else:
        counts = [len(view.heads) for view in views]
        given = zip(*(x.index_select(1, order[0]).split(counts, 1) for x in new))
    outs = []
    for view, (q, k, v) in zip(views, given):
        out, lse = _step_of_one_rule(q, k, v, view, length, rules.take(view.heads), scale, softcap)
        if s_aux is not None:
            out = _with_sink(out, lse, s_aux.unflatten(0, (rules.heads, -1))[list(view.heads)])
        outs.append(out)
    out = outs[0] if order is None else torch.cat(outs, 1).index_select(1, order[1])
    return out.reshape(len(out), 1, -1, out.shape[-1])


def _with_sink(out, lse, logits):
    """Adds a logit `[heads, group]` to the softmax of output `[batch, heads, group, dim]`."""
    flat, flat_lse = (x.flatten(1, 2).unsqueeze(2) for x in (out, lse))
    return add_sink_logit(flat, flat_lse, logits.flatten()).view_as(out)


def _step_of_one_rule(query, key, value, view, length, rules, scale, softcap):
    """The step for heads of one rule: query `[batch, heads, group, dim]`, key and value `[batch, heads, dim]`."""
    slot, parts = rules.slot(length), []
    for start, keys, values in view.pieces:
        held = min(length + 1 - start, keys.shape[2])
        if held <= 0:  # room for later
            continue
        if 0 <= slot - start < held:
            keys.select(2, slot - start).copy_(key)
            values.select(2, slot - start).copy_(value)
        mask = None
        if length >= rules.window[0]:
            mask = mask_of_one(start, start + held, (length + 1,), (length,), 1, rules, query.device).to(query.dtype)
        keys, values = keys.narrow(2, 0, held), values.narrow(2, 0, held)
        alone = len(view.pieces) == 1
        parts.append(attend(query, keys, values, scale=scale, mask=mask, softcap=softcap, alone=alone))
    return merge(parts)


@lru_cache(maxsize=4096)
def _order(kinds, device):
    """Heads in the order of their kinds, and where each head stands in it; `None` where that changes nothing."""
    order = torch.tensor([head for heads in kinds for head in heads], device=device)
    back = torch.argsort(order)
    return None if len(kinds) == 1 and torch.equal(order, back) else (order, back)
