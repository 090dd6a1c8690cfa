"""Heads of equal rules, and the order in which their rows get pages."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from .table import Ids

if TYPE_CHECKING:
    from redknot_kernels import HeadRules


@lru_cache(maxsize=1024)
def most_pages(rules: HeadRules) -> Int[np.ndarray, " heads"]:
    """Pages that a row of each head has at most."""
    return np.array(rules.max_pages)


@lru_cache(maxsize=1024)
def kinds(rules: HeadRules) -> tuple[tuple[int, ...], ...]:
    """The heads that grow for ever, and the others by equal rules."""
    groups = (*rules.stored_groups, *rules.local_groups)
    parts = (rules.global_heads, *(heads for _, heads in groups))
    return tuple(tuple(heads) for heads in parts if heads)


def places_of(chosen: Bool[np.ndarray, "batch heads columns"], rules: HeadRules) -> Ids:
    """Flat places of what is chosen: each kind in the order of its rows, which keeps runs of pages together."""
    places = np.flatnonzero(chosen)
    kind = _kind_of(rules)[places // chosen.shape[2] % chosen.shape[1]]
    return places[kind.argsort(kind="stable")]


@lru_cache(maxsize=1024)
def _kind_of(rules: HeadRules) -> Int[np.ndarray, " heads"]:
    """The kind of each head."""
    return np.array([next(i for i, heads in enumerate(kinds(rules)) if h in heads) for h in range(rules.heads)])
