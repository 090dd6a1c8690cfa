"""Page tables of all seats, as kernels read them: a row of numbers a seat, on each device that has layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from redknot_hf.cache.pool import staged
from redknot_hf.cache.storage import Storage

from .scheduler import Sequence

Flat = Int[Tensor, "seats width"]
Layers = Mapping[int, Storage]
# Of each layer the tables of some seats.
Views = dict[int, Int[Tensor, "seats _heads _columns"]]


class Tables:
    """The tables of the layers of each device, hot and cold, in one tensor.

    Attributes:
        flat: By device.

    Args:
        layers: By device.
        seats: How many.
        columns: Of rows that keep everything.
    """

    def __init__(self, layers: Mapping[torch.device, Layers], seats: int, columns: int) -> None:
        self.flat: dict[torch.device, Flat] = {}
        # Of each layer, and whether it is the cold one: device, where it begins, heads and columns.
        self._places: dict[tuple[int, bool], tuple[torch.device, int, int, int]] = {}
        for device, mine in layers.items():
            width = 0
            for i, storage in mine.items():
                rules = storage.rows.rules
                for cold, wide in (
                    (False, _columns(storage, columns)),
                    (True, columns * bool(rules.stored_heads)),
                ):
                    if wide:
                        self._places[i, cold] = device, width, rules.heads, wide
                        width += rules.heads * wide
            with torch.inference_mode(False):
                self.flat[device] = torch.zeros(seats, width, dtype=torch.int32, device=device)

    def put(self, sequence: Sequence, seat: int) -> None:
        """Brings the tables of a sequence to a seat."""
        found = {device: np.zeros(flat.shape[1], np.int32) for device, flat in self.flat.items()}
        for (i, cold), (device, at, heads, width) in self._places.items():
            storage = sequence.held.layers[i].storage
            for rows in [part.rows for part in storage.cold.parts.values()] if cold else [storage.rows]:
                table = rows.table[0, :, :width]
                row = found[device][at : at + heads * width].reshape(heads, width)
                row[:, : table.shape[1]] += np.maximum(table, 0)
        for device, row in found.items():
            self.flat[device][seat].copy_(staged(row, device), non_blocking=True)

    def of(self, device: torch.device, flat: Flat) -> tuple[Views, Views]:
        """Of each layer on a device the tables of some seats, hot ones and cold ones, as views of their numbers."""
        found: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for (i, cold), (home, at, heads, width) in self._places.items():
            if home == device:
                found[cold][i] = flat[:, at : at + heads * width].unflatten(1, (heads, width))
        return found


def _columns(storage: Storage, columns: int) -> int:
    rules = storage.rows.rules
    return columns if rules.global_heads else min(columns, max(rules.max_pages))
