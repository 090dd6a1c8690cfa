"""Intervals of means and differences over contexts: questions about one context are no independent witnesses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

RESAMPLES = 4000
SURE = 0.95
FEWEST = 5  # contexts without which resampling them says nothing


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; with fewer than `FEWEST` contexts there is none, and the ends are `None`."""

    value: float
    low: float | None
    high: float | None

    def scaled(self, factor: float) -> Estimate:
        """Return it in other units."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Estimate(self.value * factor, low, high)

    def to_json(self) -> list[float | None]:
        """Return value, low and high, rounded to six digits."""
        return [None if x is None else float(f"{x:.6g}") for x in (self.value, self.low, self.high)]


def estimate(
    clusters: Sequence[Hashable], columns: Sequence[Sequence[float]], figure: Callable[..., Any], seed: int = 0
) -> Estimate:
    """Return a figure of column sums with a bootstrap interval (BCa) over whole clusters.

    Args:
        clusters: For each observation the cluster it belongs to.
        columns: Of each observation some numbers; all columns are resampled together, so that pairs stay pairs.
        figure: Makes the figure from the columns' sums; it gets arrays.
        seed: Of the resampling.
    """
    names = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(columns), len(names)))
    where = np.array([names[cluster] for cluster in clusters])
    for column, total in zip(columns, sums, strict=True):
        np.add.at(total, where, np.asarray(column, dtype=float))
    value = float(figure(*sums.sum(1)))
    if len(names) < FEWEST:
        return Estimate(value, None, None)
    without = [float(figure(*np.delete(sums, i, axis=1).sum(1))) for i in range(len(names))]
    if np.ptp(without) <= 1e-12 * max(1.0, abs(value)):  # clusters agree: resampling them changes nothing
        return Estimate(value, value, value)
    from scipy.stats import bootstrap  # here, since figures of few contexts need no scipy

    found = bootstrap(
        tuple(sums), lambda *drawn, axis: figure(*(part.sum(axis) for part in drawn)), paired=True, vectorized=True,
        n_resamples=RESAMPLES, confidence_level=SURE, method="BCa", rng=seed,
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(found.low), float(found.high))


def check_intervals(clusters: int) -> None:
    """See that figures of so many clusters will get their intervals, before anything is measured.

    Raises:
        ImportError: They need scipy, and it is not installed.
    """
    if clusters >= FEWEST and find_spec("scipy") is None:
        raise ImportError(
            f"intervals over {clusters} contexts need scipy: pip install scipy, or take fewer than {FEWEST} contexts"
        )


def mean(clusters: Sequence[Hashable], values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean over observations, its interval over clusters."""
    return estimate(clusters, (values, [1.0] * len(values)), lambda total, n: total / n, seed)


def difference(
    clusters: Sequence[Hashable], ours: Sequence[float], theirs: Sequence[float], seed: int = 0
) -> Estimate:
    """Return the mean difference of paired scores between 0 and 1.

    Where no pair differs a bootstrap would call that certain. The interval then is what so many equal pairs leave
    possible: a share of unequal ones up to `1 - 0.05 ** (1 / n)` (the rule of three).
    """
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    if not any(apart) and len(set(clusters)) >= FEWEST:
        bound = 1 - (1 - SURE) ** (1 / len(apart))
        return Estimate(0.0, -bound, bound)
    return mean(clusters, apart, seed)
