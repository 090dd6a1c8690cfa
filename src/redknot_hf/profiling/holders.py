"""Heads that hold keys, apart from those of layers that attend another layer's: a plan's choices are the holders'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from redknot_hf.plan.per_layer import kv_heads, kv_sources
from redknot_hf.plan.plan import HeadPlan, HeadSpec


@dataclass(frozen=True)
class Holders:
    """Which heads of a model hold keys.

    Attributes:
        heads: KV heads of each layer, also of those that share keys.
        sources: The layer whose keys each layer attends: itself, or an earlier one.
    """

    heads: tuple[int, ...]
    sources: tuple[int, ...]

    @classmethod
    def of(cls, config: Any) -> Holders:
        """Those of the model with this config."""
        return cls(kv_heads(config), kv_sources(config))

    @property
    def by_layer(self) -> tuple[int, ...]:
        """Heads of each layer that hold keys: none where it shares another layer's."""
        return tuple(n if self.sources[i] == i else 0 for i, n in enumerate(self.heads))

    def fold(
        self, table: Float[np.ndarray, "heads *rest"], join: np.ufunc = np.add
    ) -> Float[np.ndarray, "held *rest"]:
        """Joins what was measured of every head with what was of those that attend the same keys.

        Args:
            table: Of all heads, counted layer by layer; not changed.
            join: Such as `np.maximum`.
        """
        found = np.zeros((sum(self.by_layer), *table.shape[1:]))
        held = self._held()
        own = np.repeat([source == i for i, source in enumerate(self.sources)], self.heads)
        found[held[own]] = table[own]
        join.at(found, held[~own], table[~own])
        return found

    def plan(self, specs: Sequence[HeadSpec], **more: Any) -> HeadPlan:
        """The plan in which these heads, counted layer by layer, do as they are told, and layers that share follow.

        Args:
            specs: Of the heads that hold keys.
            more: `provenance`, of the plan.
        """
        ends = np.cumsum((0, *self.by_layer))
        return HeadPlan(tuple(tuple(specs[ends[i] : ends[i + 1]]) for i in self.sources), **more)

    def _held(self) -> Int[np.ndarray, " heads"]:
        """For each head, which of those that hold keys it attends with."""
        first = np.cumsum((0, *self.by_layer))
        parts = [first[i] + np.arange(n) for i, n in zip(self.sources, self.heads, strict=True)]
        return np.concatenate([np.arange(0), *parts])
