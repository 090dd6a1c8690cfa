"""Sequences on the host: their pages as they lie, hot and cold, so that what comes back is what went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from redknot_hf.cache.rows import Rows
from redknot_hf.cache.storage import Storage

_ALIGNED = 64  # bytes, from which every tensor begins
# Pinned memory is taken in blocks of one size, which torch keeps when they are given back and hands out again: to pin
# a block takes longer than to fill it.
_BLOCK = 32 << 20
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
    """

    layers: Mapping[int, list[Part]]
    counts: Mapping[int, Int[np.ndarray, " batch"]]
    nbytes: int

    @classmethod
    def of(cls, storages: Mapping[int, Storage]) -> Away:
        """Copies what one sequence holds to the host; waits until it is there."""
        sizes = [_trimmed(x) for x in storages.values()]
        devices = {x.device for x in storages.values() if x.device.type == "cuda"}
        blocks, layers = _Blocks(sum(sizes), bool(devices)), {}
        for i, storage in storages.items():
            layers[i] = []
            for rows, pool, _ in storage.held(0):
                with storage.pool.lock:
                    own, mine = pool.part(rows)
                layers[i].append(Part(mine, tuple(map(blocks.copied, own.pages))))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return cls(layers, {i: x.cold.counts for i, x in storages.items()}, sum(sizes))

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


class _Blocks:
    """Memory of the host, filled from its beginning.

    Args:
        nbytes: That will be needed; a block holds no more.
        pinned: Copies from a device wait for nothing.
    """

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self._size, self._pinned = min(_BLOCK, nbytes), pinned
        self._block, self._at = torch.empty(0, dtype=torch.uint8), 0

    def copied(self, pages: Tensor) -> list[Tensor]:
        """A copy of pages, in as many pieces as there are blocks that it lies in."""
        pieces: list[Tensor] = []
        each, first = pages[:1].nbytes, 0
        while first < len(pages):
            count = min((len(self._block) - self._at) // each, len(pages) - first)
            if not count:
                size = max(_BLOCK if self._pinned else self._size, each)
                self._block, self._at = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned), 0
                continue
            piece = pages[first : first + count]
            into = self._block[self._at : self._at + piece.nbytes].view(pages.dtype).view(piece.shape)
            pieces.append(into.copy_(piece, non_blocking=True))
            self._at, first = min(self._at + _whole(piece.nbytes), len(self._block)), first + count
        return pieces


def pin(nbytes: int) -> None:
    """Takes pinned memory for sequences to come, so that the first of them need not wait for it."""
    count = -(-min(nbytes, _WARM) // _BLOCK)
    held = [torch.empty(_BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(count)]  # lest one be had twice
    held.clear()
