"""Sequences on the host: their pages as they lie, hot and cold, so that what comes back is what went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from redknot_hf.cache.rows import Rows
from redknot_hf.cache.storage import Storage

_ALIGNED = 64  # bytes, from which every tensor begins


class Part(NamedTuple):
    """Rows, and the pages that they list and nobody else.

    Attributes:
        rows: Of one sequence.
        pages: Keys and values of the pages, or codes and scales.
    """

    rows: Rows
    pages: tuple[Tensor, ...]


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
        flat = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=bool(devices))
        at, layers = 0, {}
        for i, storage in storages.items():
            layers[i] = []
            for rows, pool, _ in storage.held(0):
                with storage.pool.lock:
                    own, mine = pool.part(rows)
                pages = []
                for tensor in own.pages:
                    pages.append(_copied(tensor, flat[at : at + tensor.nbytes]))
                    at += _whole(tensor.nbytes)
                layers[i].append(Part(mine, tuple(pages)))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return cls(layers, {i: x.cold.counts for i, x in storages.items()}, len(flat))

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
                    ids = pool.allocate(len(part.pages[0]))
                    where = torch.from_numpy(ids.astype(np.int64)).to(storage.device)
                    for tensor, held in zip(pool.pages, part.pages, strict=True):
                        tensor.index_copy_(0, where, held.to(storage.device, non_blocking=True))
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


def _copied(tensor: Tensor, into: Tensor) -> Any:
    return into.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
