"""A span with an address: a text stored for reuse."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from redknot_hf.cache.span import KeptLayer, PackedLayers, places

from .coarse import Coarse, Shape

if TYPE_CHECKING:
    from .store import SegmentStore


@dataclass(frozen=True)
class SegmentRef:
    """A text in a store. It stays good when the segment leaves the store's memory: the store computes it anew.

    Attributes:
        address: Hash over model, plan, tokens and prefix.
        ids, prefix: The tokens, and those that they were read behind, the stand-in included.
        store: Where the segment is; `None` in another process, where `store.ref(ids, prefix)` names it again.
    """

    address: str
    ids: tuple[int, ...] = field(compare=False)
    prefix: tuple[int, ...] = field(compare=False)
    store: SegmentStore | None = field(compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return SegmentRef, (self.address, self.ids, self.prefix, None)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        behind = f" behind {len(self.prefix)}" if self.prefix else ""
        return f"SegmentRef({self.address[:8]}, {len(self):,} tokens{behind})"


@dataclass(frozen=True, eq=False)
class Segment(PackedLayers):
    """Keys and values of a span of text, as computed behind `prefix` at the positions from `len(prefix)` on.

    Attributes:
        address: What the content is: a hash over model, plan, tokens and prefix.
        ids: The tokens.
        prefix: Tokens they were read behind, which are not stored with them.
        layers: What is kept of each layer; `None` for a layer that has no keys of its own.
        data: All keys, layer by layer, then all values; or bytes, as `coarse` has them. One run of memory, so that one
            copy moves it.
        coarse: How it is held in fewer bits, if it is.
    """

    address: str
    ids: tuple[int, ...]
    prefix: tuple[int, ...]
    layers: tuple[KeptLayer | None, ...]
    data: Shaped[Tensor, " elements"]  # pyright: ignore[reportIncompatibleVariableOverride]
    coarse: Coarse | None = None

    @property
    def tokens(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Length of the text."""
        return len(self.ids)

    @property
    def shape(self) -> Shape:
        """What it is of."""
        return Shape(self.layers, self.tokens, not self.prefix)

    @property
    def dtype(self) -> torch.dtype:
        """Of its keys and values."""
        return self.data.dtype if self.coarse is None else self.coarse.dtype

    def with_data(self, data: Shaped[Tensor, " elements"]) -> Segment:
        """The same segment, held elsewhere."""
        return replace(self, data=data)

    def coarsened(self, coarse: Coarse | None) -> Segment:
        """The same text in fewer bits; itself with `None`."""
        if coarse is None:
            return self
        pairs = [None if kept is None else self.pair(i) for i, kept in enumerate(self.layers)]
        return replace(self, data=coarse.packed(pairs, self.shape), coarse=coarse)

    def pair(self, layer: int) -> tuple[Float[Tensor, "kept key_dim"], Float[Tensor, "kept value_dim"]]:
        """Keys and values of a layer, packed: views; or copies, where they are held in fewer bits."""
        if self.coarse is None:
            return super().keys(layer), super().values(layer)
        return self.coarse.unpacked(self.data, self.shape, layer)

    def extents(self, part: int, parts: int) -> list[slice]:
        """Where in the data the layers of one part lie; see `PackedLayers`."""
        return super().extents(part, parts) if self.coarse is None else self.coarse.extents(self.shape, part, parts)

    def keys(self, layer: int) -> Float[Tensor, "kept key_dim"]:
        """The keys of a layer; see `pair`."""
        return self.pair(layer)[0]

    def values(self, layer: int) -> Float[Tensor, "kept value_dim"]:
        """The values of a layer; see `pair`."""
        return self.pair(layer)[1]

    def __repr__(self) -> str:
        behind = f" behind {len(self.prefix)}" if self.prefix else ""
        share = f", {self.nbytes / self.dense_nbytes:.0%} of dense" if self.dense_nbytes else ""
        return (
            f"Segment({self.address[:8]}, {self.tokens:,} tokens{behind}, {self.nbytes / 2**20:.1f} MiB{share}, "
            f"{self.dtype if self.coarse is None else self.coarse.storage}, {self.data.device})"
        )


def empty(
    address: str,
    ids: tuple[int, ...],
    prefix: tuple[int, ...],
    layers: tuple[KeptLayer | None, ...],
    like: Float[Tensor, "..."],
    coarse: Coarse | None = None,
) -> Segment:
    """A segment whose keys and values are yet to be written, on the device and of the dtype of `like`."""
    elements, dtype = places(layers, len(ids))[1], like.dtype
    if coarse is not None:
        elements, dtype = coarse.nbytes(Shape(layers, len(ids), not prefix)), torch.uint8
    with torch.inference_mode(False):  # so that what was made in inference mode can be written outside of it
        return Segment(address, ids, prefix, layers, like.new_zeros(elements, dtype=dtype), coarse)
