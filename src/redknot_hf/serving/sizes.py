"""What a budget of memory buys: rings of local heads, and columns of pages of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """What a budget buys.

    Attributes:
        ring: Bytes of the local rows of one sequence.
        column: Bytes of one page of every row that keeps everything.
        rings, columns: How many of them there are.
        page_size: Tokens of a column.
    """

    ring: int
    column: int
    rings: int
    columns: int
    page_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.rings * self.ring + self.columns * self.column

    def needs(self, tokens: int) -> int:
        """Bytes that a sequence of so many tokens needs at most."""
        return self.ring + -(-tokens // self.page_size) * self.column


def longest(fits: Callable[[int], bool], most: int) -> int:
    """Tokens of the longest sequence that fits where nothing else is held, up to so many."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def bytes_of(memory: float | int | str, device: torch.device) -> int:
    """Bytes that `memory` says: a number of them, `"8GiB"`, or a share (0 to 1) of what is free.

    Raises:
        ValueError: It says nothing of the kind.
    """
    units = {"KiB": 10, "MiB": 20, "GiB": 30}
    try:
        if isinstance(memory, str) and memory[-3:] in units:
            value: float = float(memory[:-3]) * (1 << units[memory[-3:]])
        else:
            value = float(memory)
    except ValueError:
        value = -1
    if value <= 0:
        raise ValueError(
            f"memory={memory!r}: give bytes, such as 8 * 2**30 or '8GiB', or a share of what is free, 0.9"
        )
    if value > 1:
        return int(value)
    return int(value * _free(device))


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        import psutil
    except ImportError as e:
        raise ValueError(
            "a share of the host's memory is asked of psutil: give bytes, or pip install redknot-hf[serve]"
        ) from e
    return psutil.virtual_memory().available
