"""Sequences on the host: their pages as they lie, hot and cold, so that what comes back is what went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from redknot_hf.cache.rows import Rows
from redknot_hf.cache.storage import Storage

_ALIGNED = 64  # bytes, from which every tensor begins
_BLOCK = 32 << 20  # bytes of a block of the host's memory
_WARM = 1 << 30  # bytes that are pinned beforehand, at most


class Part(NamedTuple):
    """Rows, and the pages that they list and nobody else.

    Attributes:
        rows: Of one sequence.
        pages: Keys and values of the pages, or codes and scales, each in pieces.
    """

    rows: Rows
    pages: tuple[list[Tensor], ...]


@dataclass(frozen=True, eq=False)
class Away:
    """A sequence without a place on the device.

    Attributes:
        layers: Of each layer the parts, hot pages first.
        counts: Of each layer, how many pages of its stored rows are cold.
        nbytes: Of the pages.
        blocks: In which they lie.
    """

    layers: Mapping[int, list[Part]]
    counts: Mapping[int, Int[np.ndarray, " batch"]]
    nbytes: int
    blocks: list[UInt8[Tensor, "_bytes"]]

    @classmethod
    def of(cls, storages: Mapping[int, Storage], free: HostBlocks) -> Away:
        """Copies what one sequence holds to blocks of the host; waits until it is there."""
        sizes = [_trimmed(x) for x in storages.values()]
        filled, layers = _Filled(free, sum(sizes)), {}
        for i, storage in storages.items():
            layers[i] = []
            for rows, pool, _ in storage.held(0):
                with storage.pool.lock:
                    own, mine = pool.part(rows)
                layers[i].append(Part(mine, tuple(map(filled.copied, own.pages))))
        _wait(storages)
        return cls(layers, {i: x.cold.counts for i, x in storages.items()}, sum(sizes), filled.blocks)

    def needs(self, index: int, storage: Storage, tokens: int) -> list[int]:
        """Pages that a layer takes, pool by pool, when the sequence is back and has come to so many tokens."""
        least, size = self.counts[index], storage.page_size
        then = [held.lengths if held.pool is storage.pool else np.maximum(held.lengths, least * size)
                for held in storage.held(tokens)]  # fmt: skip
        return [int(part.rows.pages_needed(n).sum()) for part, n in zip(self.layers[index], then, strict=True)]

    def back(self, storages: Mapping[int, Storage]) -> None:
        """Puts everything into empty rows, whose pools have room for it."""
        for i, storage in storages.items():
            with storage.pool.lock:
                for (rows, pool, _), part in zip(storage.held(0), self.layers[i], strict=True):
                    ids = pool.allocate(sum(map(len, part.pages[0])))
                    where = torch.from_numpy(ids.astype(np.int64)).to(storage.device)
                    for tensor, pieces in zip(pool.pages, part.pages, strict=True):
                        for at, held in zip(where.split([len(x) for x in pieces]), pieces, strict=True):
                            tensor.index_copy_(0, at, held.to(storage.device, non_blocking=True))
                    rows.become(part.rows, ids)
                storage.cold.counts = self.counts[i]
            storage.left_align()
        if len({x.device for x in storages.values()}) > 1:
            _wait(storages)  # what a device reads another may not write


def _wait(storages: Mapping[int, Storage]) -> None:
    """Waits for what was launched on the devices of layers."""
    for device in {x.device for x in storages.values() if x.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()


def _trimmed(storage: Storage) -> int:
    """Lets rows go of pages that hold nothing yet; bytes of the others, on the host."""
    nbytes = 0
    with storage.pool.lock:
        for rows, pool, _ in storage.held(0):
            rows.cut(rows.lengths)
            each = [part.shape[1:].numel() * part.element_size() for part in pool.pages]
            nbytes += sum(_whole(len(rows.page_table.listed) * size) for size in each)
    return nbytes


def _whole(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


class HostBlocks:
    """Blocks of the host's memory, which are kept where they are pinned, since that takes longer than to fill them.

    torch keeps them too, but lets all of them go whenever a graph is captured.

    Args:
        pinned: Copies from a device wait for nothing.
        nbytes: That are taken at once, 1 GiB at most.
    """

    def __init__(self, pinned: bool, nbytes: int = 0) -> None:
        self.pinned = pinned
        self._free: list[Tensor] = []
        if pinned:
            self.give([self.take(_BLOCK) for _ in range(-(-min(nbytes, _WARM) // _BLOCK))])

    def take(self, nbytes: int) -> UInt8[Tensor, "_bytes"]:
        """A block of so many bytes, or more where it is pinned."""
        if self.pinned and self._free and nbytes <= _BLOCK:
            return self._free.pop()
        size = max(nbytes, _BLOCK) if self.pinned else nbytes
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)

    def give(self, blocks: Iterable[UInt8[Tensor, "_bytes"]]) -> None:
        """Takes blocks back, of which nothing is read any more but by what was launched before."""
        self._free += [block for block in blocks if self.pinned and len(block) == _BLOCK]

    def clear(self) -> None:
        """Lets all go."""
        self._free.clear()


class _Filled:
    """Blocks that are filled one after another.

    Attributes:
        blocks: Those that were taken.

    Args:
        free: Where they are taken from.
        nbytes: That will be needed; a block has no more, unless it is pinned.
    """

    def __init__(self, free: HostBlocks, nbytes: int) -> None:
        self._free, self._size = free, min(_BLOCK, nbytes)
        self.blocks, self._at = [torch.empty(0, dtype=torch.uint8)], 0

    def copied(self, pages: Tensor) -> list[Tensor]:
        """A copy of pages, in as many pieces as there are blocks that it lies in."""
        pieces: list[Tensor] = []
        each, first = pages[:1].nbytes, 0
        while first < len(pages):
            count = min((len(self.blocks[-1]) - self._at) // each, len(pages) - first)
            if not count:
                self.blocks.append(self._free.take(max(self._size, each)))
                self._at = 0
                continue
            piece = pages[first : first + count]
            into = self.blocks[-1][self._at : self._at + piece.nbytes].view(pages.dtype).view(piece.shape)
            pieces.append(into.copy_(piece, non_blocking=True))
            self._at, first = min(self._at + _whole(piece.nbytes), len(self.blocks[-1])), first + count
        return pieces
