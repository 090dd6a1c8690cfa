"""Attention of a few queries of a text, in plain PyTorch: nothing is computed for the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from redknot_kernels import HeadRules, add_sink_logit, attend
from redknot_kernels.plain.pages import take_heads
from torch import Tensor

_SPAN = 256  # tokens whose queries are attended in one call


def attend_asked(
    query: Float[Tensor, "batch query_heads rows key_dim"],
    key: Float[Tensor, "batch heads tokens key_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    rules: HeadRules,
    rows: tuple[int, ...],
    options: dict[str, Any],
) -> Float[Tensor, "batch rows query_heads value_dim"]:
    """Attends some queries over a whole text, each head under its rule.

    Args:
        rules: Of the KV heads, without storages.
        rows: Where the queries stand, ascending.
        options: `scale`, `softcap` and `s_aux`, as kernels take them.
    """
    grouped, s_aux = query.unflatten(1, (rules.heads, -1)), options["s_aux"]
    out = query.new_empty(len(query), len(rows), *grouped.shape[1:3], value.shape[-1])
    whole = [(rules.take(rules.global_heads), rules.global_heads)] if rules.global_heads else []
    for rule, members in (*whole, *rules.local_groups):
        mine, keys, values = (take_heads(x, members) for x in (grouped, key, value))
        sinks = None if s_aux is None else s_aux.unflatten(0, (rules.heads, -1))[list(members)].flatten()
        for part in _parts(rule.take((0,)), rows, mine.shape[2], query.dtype, query.device):
            k, v = (torch.cat([x[:, :, : part.sink], x[:, :, part.begin : part.end]], 2) for x in (keys, values))
            found, lse = attend(  # a group's query heads as one, which goes over its keys once
                mine[:, :, :, part.first : part.last].flatten(2, 3), k, v,
                scale=options["scale"], mask=part.bias, softcap=options["softcap"], alone=True,
            )  # fmt: skip
            found, lse = (x.unflatten(2, (mine.shape[2], -1)).flatten(1, 2) for x in (found, lse))
            found = add_sink_logit(found, lse, sinks).unflatten(1, (len(members), -1))
            out[:, part.first : part.last, list(members)] = found.permute(0, 3, 1, 2, 4)
    return out.flatten(2, 3)


def runs(rows: Sequence[int], span: int) -> Iterator[tuple[int, int]]:
    """Where ascending rows begin and end that stand within one span of tokens, span by span."""
    first = 0
    for _, mine in groupby(rows, lambda row: row // span):
        last = first + sum(1 for _ in mine)
        yield first, last
        first = last


def bias_of(
    seen: Bool[Tensor, "queries keys"], group: int, dtype: torch.dtype
) -> Float[Tensor, "1 1 group_queries keys"]:
    """What is added to the scores of as many query heads, one behind another, so that they see no more than this."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf).repeat(group, 1)[None, None]


class _Part(NamedTuple):
    """Queries that are attended in one call, over the sink and the keys from the first one's window on.

    Attributes:
        first, last: Which queries.
        sink: First keys that stand apart.
        begin, end: The keys of their windows.
        bias: 0 where a query sees one of these keys, and -inf elsewhere: of a group's query heads, one behind another.
    """

    first: int
    last: int
    sink: int
    begin: int
    end: int
    bias: Float[Tensor, "1 1 group_queries keys"]


@lru_cache(maxsize=16)  # all layers ask for the same, choice by choice
@torch.inference_mode(False)  # so that what was made in inference mode can be used outside of it
def _parts(
    rule: HeadRules, rows: tuple[int, ...], group: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Part, ...]:
    found = []
    for first, last in runs(rows, _SPAN):
        begin, end = max(0, rows[first] - rule.window[0] + 1), rows[last - 1] + 1
        begin = begin if begin > rule.sink[0] else 0
        sink = rule.sink[0] if begin else 0
        keys = torch.cat([torch.arange(sink), torch.arange(begin, end)])
        seen = rule.visible(torch.tensor([rows[first:last]]), keys[None])
        found.append(_Part(first, last, sink, begin, end, bias_of(seen[0], group, dtype).to(device)))
    return tuple(found)
