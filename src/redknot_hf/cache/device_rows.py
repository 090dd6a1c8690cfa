"""What kernels read of a layer's rows: page table, counts and rules, on the layer's device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from .rows import Rows


class DeviceRows:
    """A copy of a layer's rows for kernels. It may run ahead of the host: a captured step counts on the device only.

    Tensors are written in place as long as their shapes allow it, so that a captured graph keeps reading them.

    Attributes:
        table: Page of each column of each row; absent pages read as page 0.
        counts: Tokens of each sequence, and last the slots of all.
        bounds: Window, sink and ring of each head.
        most_kept: Slots that the rows of one sequence may use.
    """

    def __init__(self) -> None:
        self.table: Int[Tensor, "batch heads columns"] = torch.empty(0, 0, 0, dtype=torch.int32)
        self.counts: Int[Tensor, " batch_and_slots"] = torch.empty(0, dtype=torch.int32)
        self.bounds: Int[Tensor, "rules heads"] = torch.empty(0, 0, dtype=torch.int32)
        self.most_kept = 0
        self._version = -1
        self._lengths: Int[np.ndarray, " batch"] | None = None  # whose counts these are; never written in place
        self._slots = 0

    def refresh(self, rows: Rows, slots: int, device: torch.device) -> None:
        """Brings what has changed on the host to the device."""
        self.refresh_table(rows, device)
        if self.counts.device != device or rows.lengths is not self._lengths or slots != self._slots:
            self.counts = _put(np.append(rows.lengths, slots).astype(np.int32), self.counts, device)
            self.advanced(rows, slots)

    def refresh_table(self, rows: Rows, device: torch.device) -> None:
        """Brings the page table alone, and the rules."""
        if self.table.device != device or self._version != rows.version:
            self._version = rows.version
            self.table = _put(np.maximum(rows.table, 0), self.table, device)
            self.bounds = rows.rules.tensors(device)
            self.most_kept = rows.rules.most_kept(rows.table.shape[2])

    def advanced(self, rows: Rows, slots: int) -> None:
        """Remembers that a kernel has counted what the host has counted too."""
        self._lengths, self._slots = rows.lengths, slots

    def read_counts(self) -> Int[np.ndarray, " batch_and_slots"]:
        """Reads the counts; waits for the device."""
        return self.counts.cpu().numpy().astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a copy or a pickle makes its own."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()


def staged(values: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor of the host from which a copy to the device waits for nothing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _put(values: np.ndarray, old: Tensor, device: torch.device) -> Tensor:
    new = staged(values, device)
    if old.shape == new.shape and old.device == device:
        return old.copy_(new, non_blocking=True)
    with torch.inference_mode(False):  # so that what was made in inference mode can be written outside of it
        put = new.to(device, non_blocking=True, copy=True)
    # Graphs are captured over these tensors; compiled code need not be made anew for another cache's.
    torch._dynamo.mark_static_address(put, guard=False)
    return put
