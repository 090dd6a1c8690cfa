"""The most memory that a piece of work takes beyond what was held before."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Self

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """A context in which the peak of memory is watched; `bytes` tells it afterwards.

    On a GPU it is what the allocator held at most. On Linux it is the resident memory of the process, which is coarse:
    pages that were free within the process do not show. Elsewhere `bytes` is `None`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self._watched:
            _CLEAR.write_text("5")  # resets the peak (proc(5))
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._watched:
            self.bytes = max(0, _status("VmHWM") - self._before)

    @property
    def _watched(self) -> bool:
        return sys.platform == "linux" and os.access(_CLEAR, os.W_OK)


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
