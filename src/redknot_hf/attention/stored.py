"""What heads with cold pages attend to when a text is read in chunks, without a cache: pages that go through bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from redknot_kernels import implementation
from redknot_kernels.plain.quantise import dequantise_page, quantise_page
from torch import Tensor, nn

from redknot_hf.attention.asked import bias_of, runs
from redknot_hf.attention.dense import dense_attention
from redknot_hf.plan.storage import HOT, PAGE_SIZE, cold_pages

CHUNK = 256  # queries that see the same pages cold
BITS = {"int8": 8, "int4": 4}

Keys = Float[Tensor, "batch heads tokens key_dim"]
Values = Float[Tensor, "batch heads tokens value_dim"]


def attend_stored(
    module: nn.Module,
    query: Float[Tensor, "batch query_heads rows key_dim"],
    key: Keys,
    value: Values,
    storage: str,
    options: dict[str, Any],
    rows: Sequence[int] | None = None,
) -> Float[Tensor, "batch rows query_heads value_dim"]:
    """Attention of global heads of one storage over a whole text.

    Every chunk of queries sees what the heads keep when it begins: the first page and the hot tail as the model made
    them, the pages between as their storage gives them back, and the chunk itself.

    Args:
        module: The attention layer.
        storage: `"int8"` or `"int4"`.
        options: `scale`, `softcap` and `s_aux` (of these query heads), as kernels take them.
        rows: Where the queries stand, ascending, as a range or tuple; by default every token asks.
    """
    asked = range(key.shape[2]) if rows is None else rows
    cold = through_bits(key, value, BITS[storage])
    kernel = implementation(None, query.device).in_chunks
    if kernel is not None:
        where = _places(asked, CHUNK, query.device)
        return kernel(query, key, value, cold, *where, PAGE_SIZE, **options)
    return _masked(module, query, (key, value), cold, asked, options)


def _masked(
    module: nn.Module,
    query: Float[Tensor, "batch query_heads rows key_dim"],
    held: tuple[Keys, Values],
    cold: tuple[Keys, Values],
    rows: Sequence[int],
    options: dict[str, Any],
) -> Float[Tensor, "batch rows query_heads value_dim"]:
    """The same chunk by chunk, in ordinary attention under masks."""
    group = query.shape[1] // held[0].shape[1]
    # Query heads that are attended as one, which goes over the keys once; a logit of its own keeps each apart.
    joined = group if options["s_aux"] is None else 1
    wide = [[x.repeat_interleave(group // joined, 1) for x in pair] for pair in (held, cold)]
    outs = []
    for part in _parts(rows, CHUNK, joined, query.dtype, query.device):
        keys, values = (
            torch.cat(
                [x[:, :, : min(PAGE_SIZE, part.stop)], y[:, :, PAGE_SIZE : part.cold], x[:, :, part.cold : part.stop]],
                2,
            )
            for x, y in zip(*wide, strict=True)
        )
        mine = query[:, :, part.first : part.last].unflatten(1, (-1, joined)).flatten(2, 3)
        out = dense_attention(module, mine, keys, values, part.bias, 0.0, {}, **options)
        outs.append(out.unflatten(1, (joined, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3))
    return torch.cat(outs, 1)


@lru_cache(maxsize=2)  # all layers ask for the same
@torch.inference_mode(False)  # so that what was made in inference mode can be used outside of it
def _places(
    rows: Sequence[int], chunk: int, device: torch.device
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Where the queries stand, and where for each the cold pages end."""
    ends = [_end(row, chunk) for row in rows]
    first, second = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (list(rows), ends))
    return first, second


def _end(row: int, chunk: int) -> int:
    return PAGE_SIZE * (1 + cold_pages(row // chunk * chunk, PAGE_SIZE, HOT))


class _Part(NamedTuple):
    """Queries of a chunk, which are attended in one call: over the first page, the cold ones, and what is hot.

    Attributes:
        first, last: Which queries.
        cold: Where the cold pages end, and what is hot begins.
        stop: Where that ends.
        bias: 0 where a query sees a key, and -inf elsewhere; for the query heads that are joined, one behind another.
    """

    first: int
    last: int
    cold: int
    stop: int
    bias: Float[Tensor, "1 1 joined_queries keys"]


@lru_cache(maxsize=2)  # all layers ask for the same
@torch.inference_mode(False)  # so that what was made in inference mode can be used outside of it
def _parts(
    rows: Sequence[int], chunk: int, joined: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Part, ...]:
    found = []
    for first, last in runs(rows, chunk):
        mine = rows[first:last]
        cold, stop = _end(mine[0], chunk), mine[-1] + 1
        seen = torch.arange(stop, device=device) <= torch.tensor(list(mine), device=device)[:, None]
        found.append(_Part(first, last, cold, stop, bias_of(seen, joined, dtype)))
    return tuple(found)


def through_bits(key: Keys, value: Values, bits: int) -> tuple[Keys, Values]:
    """Keys and values of all full pages as cold pages give them back, and what follows them as it is."""
    pages = key.shape[2] // PAGE_SIZE
    if not pages:
        return key, value
    full = [x[:, :, : pages * PAGE_SIZE].unflatten(2, (pages, PAGE_SIZE)) for x in (key, value)]
    codes, scales = quantise_page(full[0], full[1], bits)
    found = dequantise_page(codes, scales, bits, PAGE_SIZE, (key.shape[-1], value.shape[-1]))
    first, second = (
        torch.cat([stored.flatten(2, 3).to(whole.dtype), whole[:, :, pages * PAGE_SIZE :]], 2)
        for whole, stored in zip((key, value), found, strict=True)
    )
    return first, second
