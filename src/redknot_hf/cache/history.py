"""Which slots of a cache were padding."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

# Slots without padding, or which slots of a step hold real tokens.
Span = int | Bool[Tensor, "batch slots"]


class SlotHistory:
    """The slots of a cache in order, as spans; flags of padded steps are shared by all layers."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    @property
    def slots(self) -> int:
        """Slots seen, padding included."""
        return sum(map(_slots, self._spans))

    @property
    def padded(self) -> bool:
        """Whether some slot was padding, so that slots are not positions."""
        return any(not isinstance(span, int) for span in self._spans)

    def add(self, span: Span) -> None:
        """Appends slots."""
        if isinstance(span, int) and self._spans and isinstance(self._spans[-1], int):
            self._spans[-1] += span
        else:
            self._spans.append(span)

    def real_among_last(self, slots: int, batch: int) -> Int[np.ndarray, " batch"]:
        """Real tokens of each sequence among the last slots."""
        counts = np.zeros(batch, np.int64)
        for span in reversed(self._spans):
            if not slots:
                break
            taken = min(_slots(span), slots)
            counts += taken if isinstance(span, int) else span[:, _slots(span) - taken :].sum(1).cpu().numpy()
            slots -= taken
        return counts

    def real_slots(self, sequence: int) -> Int[Tensor, " real"]:
        """Where the real tokens of a sequence stand."""
        flags = [
            torch.ones(span, dtype=torch.bool) if isinstance(span, int) else span[sequence].cpu()
            for span in self._spans
        ]
        return torch.cat(flags).nonzero()[:, 0] if flags else torch.zeros(0, dtype=torch.long)

    def drop_last(self, slots: int) -> None:
        """Takes the last slots back."""
        while slots:
            span = self._spans.pop()
            kept = max(_slots(span) - slots, 0)
            slots -= _slots(span) - kept
            if kept:
                self._spans.append(kept if isinstance(span, int) else span[:, :kept])

    def select(self, index: Int[Tensor, " selected"]) -> None:
        """Makes sequence i what sequence `index[i]` was."""
        self._spans = [s if isinstance(s, int) else s.index_select(0, index.to(s.device)) for s in self._spans]

    def forget_padding(self) -> None:
        """Counts steps without padding as such, where the sequences that had some are gone; waits for the device."""
        spans, self._spans = self._spans, []
        for span in spans:
            self.add(span if isinstance(span, int) or not bool(span.all()) else span.shape[1])

    def fork(self) -> SlotHistory:
        """A copy that grows apart."""
        other = SlotHistory()
        other._spans = list(self._spans)
        return other


def _slots(span: Span) -> int:
    return span if isinstance(span, int) else span.shape[1]
