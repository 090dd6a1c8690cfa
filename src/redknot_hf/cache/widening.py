"""Giving the local rows of a layer longer rings, so that more of the past can be taken back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from redknot_kernels import HeadRules, gather_tokens, scatter_tokens

from .pool import PagePool
from .rows import Rows


def widen(rows: Rows, pool: PagePool, rules: HeadRules, reserve: Callable[[], None]) -> None:
    """Lays rows out by rules with longer rings; rows that have not gone round stay where they are.

    Args:
        rows, pool: The layer's rows and their pages; both are changed.
        rules: The new rules.
        reserve: Gives every row the pages it needs.
    """
    device = pool.pages.device
    moved = []
    for b, h in np.argwhere(rows.wrapped()).tolist():
        positions = torch.from_numpy(rows.positions_held(b, h)).to(device)[None, None]
        slots = rows.rules.take((h,)).slots(positions)
        moved.append((b, h, positions, *gather_tokens(pool.pages, _row(rows, b, h, device), slots)))
    rows.widen(rules)
    reserve()
    for b, h, positions, key, value in moved:
        row, slots = _row(rows, b, h, device), rules.take((h,)).slots(positions)
        scatter_tokens(pool.pages, row, slots, key, value)


def _row(rows: Rows, sequence: int, head: int, device: torch.device) -> torch.Tensor:
    table = np.maximum(rows.table[sequence : sequence + 1, head : head + 1], 0)
    return torch.from_numpy(table).to(device)
