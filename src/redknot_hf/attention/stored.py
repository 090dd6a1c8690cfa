"""What heads with cold pages attend to when a text is read in chunks, without a cache: pages that go through bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from redknot_kernels import implementation
from redknot_kernels.plain.quantise import dequantise_page, quantise_page
from torch import Tensor, nn

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
    wide = [[x.repeat_interleave(group, 1) for x in pair] for pair in (held, cold)]
    outs = []
    for part in _parts(rows, CHUNK, query.device):
        keys, values = (
            torch.cat(
                [x[:, :, : min(PAGE_SIZE, part.stop)], y[:, :, PAGE_SIZE : part.cold], x[:, :, part.hot : part.stop]],
                2,
            )
            for x, y in zip(*wide, strict=True)
        )
        mine = query[:, :, part.first : part.last]
        outs.append(dense_attention(module, mine, keys, values, part.seen[None, None], 0.0, {}, **options))
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
    """Queries that are attended in one call, over the first page, cold ones, and what is hot for some of them.

    Attributes:
        first, last: Which queries.
        cold: Where the cold pages end for the last of them.
        hot, stop: Where what is hot begins for the first, and ends.
        seen: Which of the keys each sees.
    """

    first: int
    last: int
    cold: int
    hot: int
    stop: int
    seen: Bool[Tensor, "queries keys"]


@lru_cache(maxsize=2)  # all layers ask for the same
@torch.inference_mode(False)  # so that what was made in inference mode can be used outside of it
def _parts(rows: Sequence[int], chunk: int, device: torch.device) -> tuple[_Part, ...]:
    found = []
    for first in range(0, len(rows), chunk):
        mine = rows[first : first + chunk]
        ends = [_end(row, chunk) for row in mine]
        cold, hot, stop = ends[-1], ends[0], mine[-1] + 1
        place = torch.arange(stop, device=device)
        row, end = (torch.tensor(x, device=device)[:, None] for x in (list(mine), ends))
        near = (place <= row) & ((place >= end) | (place < PAGE_SIZE))
        seen = torch.cat([near[:, :PAGE_SIZE], place[PAGE_SIZE:cold] < end, near[:, hot:]], 1)
        found.append(_Part(first, first + len(mine), cold, hot, stop, seen))
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
