"""Packed keys and values of some tokens: for every head, those that a later context can need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float, Int
from redknot_kernels import UNBOUNDED
from torch import Tensor

Packed = Int[np.ndarray, " kept"]
# What is kept of each layer; `None` for a layer that has no keys of its own.
Layers = tuple["KeptLayer | None", ...]
# First element of a tensor in the data, and its shape.
Extent = tuple[int, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """What is kept of one layer, one entry a KV head.

    A head keeps all tokens, or the first `sink` (they are the sinks of a context that begins with this text) and
    the last `window` (queries behind it see them).

    Attributes:
        window: Last tokens kept; `UNBOUNDED` keeps all.
        sink: First tokens kept beside them.
        key_dim, value_dim: Elements of a key and of a value.
    """

    window: tuple[int, ...]
    sink: tuple[int, ...]
    key_dim: int
    value_dim: int

    def packed(self, tokens: int) -> tuple[Packed, Packed]:
        """Head and token of each key kept of a text of `tokens`, in the order of storage: head by head."""
        return _packed(self.window, self.sink, tokens)

    def tails(self, tokens: int) -> Int[np.ndarray, " heads"]:
        """For each head, the token from which on it keeps all that follow."""
        window, sink = np.array(self.window), np.array(self.sink)
        return np.where(sink + window >= tokens, 0, tokens - window)

    def kept(self, tokens: int) -> int:
        """Keys kept of a text of `tokens`, all heads together."""
        return len(self.packed(tokens)[0])


class PackedLayers:
    """Keys and values of some tokens, packed head by head: what a span and a segment have in common.

    Attributes:
        tokens: Length of the text.
        layers: What is kept of each layer; `None` for a layer that has no keys of its own.
        data: All keys, layer by layer, then all values; one run of memory, so that one copy moves it.
    """

    tokens: int
    layers: tuple[KeptLayer | None, ...]
    data: Float[Tensor, " elements"]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.data.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes that all tokens of all heads would take."""
        token = sum(len(x.window) * (x.key_dim + x.value_dim) for x in self.layers if x is not None)
        return self.tokens * token * self.dtype.itemsize

    def keys(self, layer: int) -> Float[Tensor, "kept key_dim"]:
        """The keys of a layer, packed; a view."""
        return self._view(layer, 0)

    def values(self, layer: int) -> Float[Tensor, "kept value_dim"]:
        """The values of a layer, packed; a view."""
        return self._view(layer, 1)

    def pair(self, layer: int) -> tuple[Float[Tensor, "kept key_dim"], Float[Tensor, "kept value_dim"]]:
        """Keys and values of a layer, packed; views where they are held as they are."""
        return self.keys(layer), self.values(layer)

    def extents(self, part: int, parts: int) -> list[slice]:
        """Where in the data the layers of one part lie, of so many that hold as many layers each.

        The parts of all layers together are the data, and every element is in one of them.
        """
        first, stop = (-(-len(self.layers) * i // parts) for i in (part, part + 1))
        starts = [*(start for half in self._places for start, _ in half), len(self.data)]
        halves = range(0, len(starts) - 1, max(1, len(self.layers)))
        return [slice(starts[at + first], starts[at + stop]) for at in halves]

    @cached_property
    def _places(self) -> tuple[tuple[Extent, ...], ...]:
        return places(self.layers, self.tokens)[0]

    def _view(self, layer: int, part: int) -> Tensor:
        kept = self.layers[layer]
        if kept is None:
            raise ValueError(f"layer {layer} has no keys of its own, so nothing of it is held")
        start, shape = self._places[part][layer]
        return self.data[start : start + shape[0] * shape[1]].view(shape)


@dataclass(frozen=True, eq=False)
class Span(PackedLayers):
    """What a cache holds of one sequence, from its first token on, so that another cache can go on with it.

    It says all that matters for it, and nothing of where it came from: it may be pickled, or its `data` saved.

    Attributes:
        tokens: Length of the sequence, padding not counted.
        layers, data: As `PackedLayers` has them.
    """

    tokens: int
    layers: tuple[KeptLayer | None, ...]
    data: Float[Tensor, " elements"]


@lru_cache(maxsize=1024)
def places(layers: tuple[KeptLayer | None, ...], tokens: int) -> tuple[tuple[tuple[Extent, ...], ...], int]:
    """Where in its data a text of `tokens` has each layer's keys, and values, and how many elements in all."""
    counts = [0 if x is None else x.kept(tokens) for x in layers]
    dims = [[0 if x is None else getattr(x, name) for x in layers] for name in ("key_dim", "value_dim")]
    shapes = [[*zip(counts, part, strict=True)] for part in dims]
    sizes = [n * dim for part in shapes for n, dim in part]
    starts = [0, *accumulate(sizes)]
    half = len(layers)
    found = tuple(tuple(zip(starts[i : i + half], shapes[i // half], strict=True)) for i in (0, half)) if half else ()
    return found, starts[-1]


def same_places(a: Layers, b: Layers, tokens: int) -> bool:
    """Whether two ways to keep layers keep the same of a text of `tokens`, in the same order."""
    return len(a) == len(b) and all(
        x is y or (x is not None and y is not None and _same(x, y, tokens)) for x, y in zip(a, b, strict=True)
    )


def _same(a: KeptLayer, b: KeptLayer, tokens: int) -> bool:
    dims = (a.key_dim, a.value_dim) == (b.key_dim, b.value_dim)
    return dims and all(np.array_equal(x, y) for x, y in zip(a.packed(tokens), b.packed(tokens), strict=True))


@lru_cache(maxsize=1024)
def _packed(window: tuple[int, ...], sink: tuple[int, ...], tokens: int) -> tuple[Packed, Packed]:
    places_of = []
    for w, s in zip(window, sink, strict=True):
        whole = w >= UNBOUNDED or s + w >= tokens
        places_of.append(np.arange(tokens) if whole else np.r_[np.arange(s), np.arange(tokens - w, tokens)])
    heads = np.repeat(np.arange(len(window)), [len(p) for p in places_of])
    return heads, np.concatenate(places_of) if places_of else np.zeros(0, np.int64)
