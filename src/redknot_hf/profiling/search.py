"""In which order heads can be restricted, when each choice counts the choices made before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

# The error of restricting these heads together.
Measure = Callable[[Sequence[int]], float]

SHARE = 0.3  # of the heads still global are restricted in a round
BORDER = 5  # heads on either side of the budget that may swap
FREE = 0.02  # of the error of restricting all heads: what the first, unmeasured choice may cost


class Path:
    """Heads in the order in which they are restricted, with the error of restricting all up to each.

    Attributes:
        heads: All heads, the most dispensable first.
        errors: Error with this head and all before it restricted; never falling.
    """

    def __init__(self) -> None:
        self.heads: list[int] = []
        self.errors: list[float] = []

    def extend(self, heads: Sequence[int], shares: Sequence[float], error: float) -> None:
        """Adds heads that together bring the error to `error`, rising by shares of the difference."""
        last = self.errors[-1] if self.errors else 0.0
        weights = np.maximum(np.asarray(shares, dtype=float), 1e-12)
        steps = last + np.cumsum(weights) / weights.sum() * max(error - last, 0.0)
        self.heads += list(heads)
        self.errors += steps.tolist()


def find_path(
    measure: Measure,
    prior: Sequence[int],
    seconds: float | int | None = None,
    settle: Callable[[Sequence[int]], object] = lambda heads: None,
) -> Path:
    """Restricts heads in rounds, from the most dispensable to the least.

    The prior's first heads go at once, as many as bisection finds to cost next to nothing together. In every round
    after that each head left is tried along with all that are restricted, and the best share of them is restricted: a
    head whose work another one has taken over is found in the round after, and not before. A group that costs more
    together than its heads did alone is halved.

    Args:
        measure: Error of restricting these heads.
        prior: All heads, the most dispensable first, by a cheaper measure.
        seconds: Time to search in; the order of the last round then stands for the rest.
        settle: Told before each round which heads all of its measurements have in common.

    Returns:
        The path; its last head's error is that of restricting all.
    """
    start = time.perf_counter()
    path, left = Path(), list(prior)
    everything = measure(left)
    free = _bisect(lambda n: measure(left[:n]) <= FREE * everything, len(left))
    if free:
        path.extend(left[:free], [1.0] * free, measure(left[:free]))
        left = left[free:]
    while left:
        before = path.errors[-1] if path.errors else 0.0
        settle(path.heads)
        alone = {head: measure([*path.heads, head]) for head in left}
        left.sort(key=lambda head: alone[head])
        late = seconds is not None and time.perf_counter() - start > seconds
        number = len(left) if late else max(1, round(SHARE * len(left)))
        risen = [max(alone[head] - before, 0.0) for head in left]
        together = everything if number == len(left) else measure([*path.heads, *left[:number]])
        while not late and number > 1 and together - before > 4 * sum(risen[:number]) + FREE * everything:
            number //= 2
            together = measure([*path.heads, *left[:number]])
        path.extend(left[:number], risen[:number], together)
        left = left[number:]
    return path


def measure_path(measure: Measure, order: Sequence[int], points: int) -> Path:
    """Measures an order that is known: the error after some of its heads, and lines between."""
    path = Path()
    ends = sorted({round(len(order) * (i + 1) / points) for i in range(points)})
    for first, stop in zip([0, *ends], ends, strict=False):
        if stop > first:
            path.extend(order[first:stop], [1.0] * (stop - first), measure(order[:stop]))
    return path


def refine(
    measure: Measure, local: Sequence[int], rest: Sequence[int], seconds: float | int | None = None
) -> list[int]:
    """Swaps restricted heads with global ones where that lowers the error, among the least certain of both.

    Args:
        measure: Error of restricting these heads.
        local: Heads that are restricted, the least certain last.
        rest: Heads that stay global, the least certain first.
        seconds: Time to search in.

    Returns:
        As many restricted heads.
    """
    start = time.perf_counter()
    local, rest = list(local), list(rest)
    best = measure(local)
    for head in local[: -BORDER - 1 : -1]:
        for other in rest[:BORDER]:
            if seconds is not None and time.perf_counter() - start > seconds:
                return local
            swapped = [other if h == head else h for h in local]
            error = measure(swapped)
            if error < best:
                best, local = error, swapped
                rest[rest.index(other)] = head
                break
    return local


def _bisect(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that holds, if all below do."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
