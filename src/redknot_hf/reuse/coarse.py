"""Segments in fewer bits: how keys and values of kept tokens become one run of bytes, and come back.

Every head's tokens are quantised in groups, as cold pages are (`redknot_kernels.quantise_page`): keys have a scale a
channel of a group, values one a token, and in int4 keys are turned first. What comes back is turned back, so it may be
rotated to other positions like any key. Of a text that was read behind nothing the first tokens, which have the role
of attention sinks, stay as the model made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from redknot_kernels import cold_pool, dequantise_page, quantise_page
from torch import Tensor

from redknot_hf.cache.span import KeptLayer
from redknot_hf.plan.per_layer import kv_dims
from redknot_hf.plan.storage import STORAGES

GROUP = 64  # tokens that share the scales of their keys' channels
FIRST = 16  # tokens that stay exact at the beginning of a text that begins a context
_BITS = {"int8": 8, "int4": 4}
_ALIGNED = 16  # bytes at a multiple of which every part begins

Pair = tuple[Float[Tensor, "kept key_dim"], Float[Tensor, "kept value_dim"]]


class Shape(NamedTuple):
    """What a segment is of.

    Attributes:
        layers: What is kept of each.
        tokens: Length of the text.
        begins: It was read behind nothing.
    """

    layers: tuple[KeptLayer | None, ...]
    tokens: int
    begins: bool


@dataclass(frozen=True, slots=True)
class Coarse:
    """How segments are held in fewer bits.

    Attributes:
        storage: `"int8"` or `"int4"`.
        dtype: Of the keys and values that come back, the model's.
    """

    storage: str
    dtype: torch.dtype

    @classmethod
    def of(cls, storage: str, model: Any) -> Coarse | None:
        """The storage of this name for a model's segments; `None` for `"model"`.

        Raises:
            ValueError: There is none, or the model's dims are odd and two channels share a byte.
        """
        if storage not in STORAGES:
            raise ValueError(f"storage={storage!r}: choose one of {STORAGES}")
        if storage == "int4" and (odd := [dim for dims in kv_dims(model.config) for dim in dims if dim % 2]):
            raise ValueError(f"storage='int4' holds two channels a byte, and a head dim is {odd[0]}: use 'int8'")
        return None if storage == "model" else cls(storage, model.dtype)

    @property
    def bits(self) -> int:
        """Of an element."""
        return _BITS[self.storage]

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a text."""
        return _starts(self, shape)[-1]

    def extents(self, shape: Shape, part: int, parts: int) -> list[slice]:
        """Where in the bytes the layers of one part lie, of so many that hold as many layers each."""
        starts, layers = _starts(self, shape), len(shape.layers)
        return [slice(*(starts[-(-layers * i // parts)] for i in (part, part + 1)))]

    def packed(self, pairs: Sequence[tuple[Tensor, Tensor] | None], shape: Shape) -> UInt8[Tensor, " bytes"]:
        """Keys and values of every layer, as `PackedLayers` has them, as one run of bytes."""
        device = next(pair[0].device for pair in pairs if pair is not None)
        with torch.inference_mode(False):  # so that what was made in inference mode can be read outside of it
            data = torch.zeros(self.nbytes(shape), dtype=torch.uint8, device=device)
        for kept, pair, start in zip(shape.layers, pairs, _starts(self, shape), strict=False):
            if kept is None or pair is None:
                continue
            parts = _parts(kept, shape.tokens, shape.begins, device)
            tensors = [x.index_select(0, parts.exact) for x in pair]
            for index in parts.groups:
                tensors += quantise_page(pair[0][index], pair[1][index], self.bits)
            for at, tensor in zip(self.places(kept, parts, start)[0], tensors, strict=True):
                data[at] = tensor.contiguous().flatten().view(torch.uint8)
        return data

    def unpacked(self, data: UInt8[Tensor, " bytes"], shape: Shape, layer: int) -> Pair:
        """Keys and values of one layer, in the model's dtype; copies."""
        kept = shape.layers[layer]
        if kept is None:
            raise ValueError(f"layer {layer} has no keys of its own, so nothing of it is held")
        parts, dims = _parts(kept, shape.tokens, shape.begins, data.device), (kept.key_dim, kept.value_dim)
        tensors = [data[at] for at in self.places(kept, parts, _starts(self, shape)[layer])[0]]
        keys, values = (data.new_zeros(parts.kept, dim, dtype=self.dtype) for dim in dims)
        for x, raw in zip((keys, values), tensors[:2], strict=True):
            x.index_copy_(0, parts.exact, raw.view(self.dtype).view(-1, x.shape[1]))
        for i, index in enumerate(parts.groups):
            (groups, size), (codes, scales) = index.shape, tensors[2 + 2 * i : 4 + 2 * i]
            codes, scales = codes.view(groups, -1), scales.view(torch.float16).view(groups, -1)
            found = dequantise_page(codes, scales, self.bits, size, dims)
            for x, y in zip((keys, values), found, strict=True):
                x.index_copy_(0, index.flatten(), y.flatten(0, 1).to(self.dtype))
        return keys, values

    def places(self, kept: KeptLayer, parts: _Parts, start: int) -> tuple[list[slice], int]:
        """Where a layer that begins at `start` has each of its tensors, in bytes; and where the next layer begins."""
        dims, places = (kept.key_dim, kept.value_dim), []
        sizes = [len(parts.exact) * dim * self.dtype.itemsize for dim in dims]
        for groups, size in (index.shape for index in parts.groups):
            page = cold_pool(groups, self.bits, size, dims, torch.device("meta"))
            sizes += [page.codes.nbytes, page.scales.nbytes]
        for size in sizes:
            places.append(slice(start, start + size))
            start += -(-size // _ALIGNED) * _ALIGNED
        return places, start


@lru_cache(maxsize=1024)
def _starts(coarse: Coarse, shape: Shape) -> list[int]:
    """Where each layer begins in the data, and where the last ends."""
    starts = [0]
    for kept in shape.layers:
        end = starts[-1]
        if kept is not None:
            parts = _parts(kept, shape.tokens, shape.begins, torch.device("cpu"))
            end = coarse.places(kept, parts, end)[1]
        starts.append(end)
    return starts


class _Parts(NamedTuple):
    """Which of a layer's kept tokens are stored how.

    Attributes:
        kept: Tokens of all heads together.
        exact: Those that stay as they are.
        groups: The others, `[groups, size]`, by the size of their groups.
    """

    kept: int
    exact: Int[Tensor, " exact"]
    groups: tuple[Int[Tensor, "groups size"], ...]


@lru_cache(maxsize=256)  # many layers keep alike, and a segment is read layer by layer
def _parts(kept: KeptLayer, tokens: int, begins: bool, device: torch.device) -> _Parts:
    heads, _ = kept.packed(tokens)
    exact: list[int] = []
    groups: dict[int, list[np.ndarray]] = {}
    for head in range(len(kept.window)):
        mine = np.flatnonzero(heads == head)
        first = min(FIRST, len(mine)) if begins else 0
        exact += mine[:first].tolist()
        for at in range(first, len(mine), GROUP):
            group = mine[at : at + GROUP]
            groups.setdefault(len(group), []).append(group)
    on_device = [torch.from_numpy(np.stack(groups[size])).to(device) for size in sorted(groups, reverse=True)]
    return _Parts(len(heads), torch.tensor(exact, dtype=torch.long, device=device), tuple(on_device))
