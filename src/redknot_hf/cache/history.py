"""Which slots of a cache were padding."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

# A number of slots without padding, or which slots of a step hold real tokens.
Slots = int | Bool[Tensor, "batch slots"]


class SlotHistory:
    """The slots of a cache in order; flags of padded steps are shared by all layers.

    Attributes:
        slots: How many there are, padding included.
    """

    def __init__(self) -> None:
        self.slots = 0
        self._stretches: list[Slots] = []

    @property
    def padded(self) -> bool:
        """Whether some slot was padding, so that slots are not positions."""
        return any(not isinstance(part, int) for part in self._stretches)

    def add(self, part: Slots) -> None:
        """Appends slots."""
        self.slots += _slots(part)
        if isinstance(part, int) and self._stretches and isinstance(self._stretches[-1], int):
            self._stretches[-1] += part
        else:
            self._stretches.append(part)

    def real_among_last(self, slots: int, batch: int) -> Int[np.ndarray, " batch"]:
        """Real tokens of each sequence among the last slots."""
        counts = np.zeros(batch, np.int64)
        for part in reversed(self._stretches):
            if not slots:
                break
            taken = min(_slots(part), slots)
            counts += taken if isinstance(part, int) else part[:, _slots(part) - taken :].sum(1).cpu().numpy()
            slots -= taken
        return counts

    def real_slots(self, sequence: int) -> Int[Tensor, " real"]:
        """Where the real tokens of a sequence stand."""
        flags = [
            torch.ones(part, dtype=torch.bool) if isinstance(part, int) else part[sequence].cpu()
            for part in self._stretches
        ]
        return torch.cat(flags).nonzero()[:, 0] if flags else torch.zeros(0, dtype=torch.long)

    def drop_last(self, slots: int) -> None:
        """Takes the last slots back."""
        self.slots -= slots
        while slots:
            part = self._stretches.pop()
            kept = max(_slots(part) - slots, 0)
            slots -= _slots(part) - kept
            if kept:
                self._stretches.append(kept if isinstance(part, int) else part[:, :kept])

    def select(self, index: Int[Tensor, " selected"]) -> None:
        """Makes sequence i what sequence `index[i]` was."""
        self._stretches = [s if isinstance(s, int) else s.index_select(0, index.to(s.device)) for s in self._stretches]

    def forget_padding(self) -> None:
        """Counts steps without padding as such, where the sequences that had some are gone; waits for the device."""
        parts, self._stretches, self.slots = self._stretches, [], 0
        for part in parts:
            self.add(part if isinstance(part, int) or not bool(part.all()) else part.shape[1])

    def fork(self) -> SlotHistory:
        """A copy that grows apart."""
        other = SlotHistory()
        other.slots, other._stretches = self.slots, list(self._stretches)
        return other


def _slots(part: Slots) -> int:
    return part if isinstance(part, int) else part.shape[1]
