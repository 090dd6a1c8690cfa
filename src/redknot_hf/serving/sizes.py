"""What a budget of memory buys: rings of local heads, and columns of pages of the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

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


def bought(
    costs: Sequence[tuple[int, int, int]], seats: int, whole: int, times: int, least: Callable[[int], int]
) -> tuple[int, int]:
    """How many rings and columns budgets buy: as many columns as are left room for beside the rings.

    Args:
        costs: Of each device the budget, and the bytes there of a ring and of a column.
        seats: Sequences at most.
        whole: Columns of the longest sequence.
        times: How often seats may have what they need, at most.
        least: The least of what all ranks buy, which is what counts.
    """
    rings, columns = seats * times, seats * whole * times
    for budget, ring, column in costs:
        if ring and column:
            # Half of the budget, or more where sequences of half the greatest length want more.
            rings = min(rings, max(int(max(0.5 * budget // ring, budget // (ring + whole * column / 2))), 1))
        elif ring:
            rings = min(rings, budget // ring)
    rings = least(rings)
    return rings, least(
        min([columns, *((budget - rings * ring) // column for budget, ring, column in costs if column)])
    )


def is_share(memory: float | int | str) -> bool:
    """Whether `memory` is a share of what is free.

    Raises:
        ValueError: It says nothing of the kind, and no bytes either.
    """
    return _number(memory) <= 1


def bytes_of(memory: float | int | str, device: torch.device) -> int:
    """Bytes that `memory` says: a number of them, `"8GiB"`, or a share (0 to 1) of what is free.

    Raises:
        ValueError: It says nothing of the kind.
    """
    number = _number(memory)
    return int(number) if number > 1 else int(number * _free(device))


def _number(memory: float | int | str) -> float:
    units = {"KiB": 10, "MiB": 20, "GiB": 30}
    try:
        if isinstance(memory, str) and memory[-3:] in units:
            value: float = float(memory[:-3]) * (1 << units[memory[-3:]])
        else:
            value = float(memory)
    except ValueError:
        value = -1
    if not 0 < value < inf:
        raise ValueError(
            f"memory={memory!r}: give bytes, such as 8 * 2**30 or '8GiB', or a share of what is free, 0.9"
        )
    return value


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        import psutil
    except ImportError as e:
        raise ValueError(
            "a share of the host's memory is asked of psutil: give bytes, or pip install redknot-hf[serve]"
        ) from e
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks that torchrun has started on this host
    return psutil.virtual_memory().available // here
