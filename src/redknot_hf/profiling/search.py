"""In which order heads can be restricted, when each choice counts the choices made before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product, takewhile

import numpy as np

# The error of restricting these heads together.
Measure = Callable[[Sequence[int]], float]

SHARE = 0.3  # of the heads still global are restricted in a round
BORDER = 16  # heads on either side of the budget that may swap
PAIRS = 16  # swaps that are tried in a round
FREE = 0.02  # of the error of restricting all heads: what the first, unmeasured choice may cost


class Path:
    """Heads in the order in which they are restricted, with the error of restricting all up to each.

    Attributes:
        heads: All heads, the most dispensable first.
        errors: Error with this head and all before it restricted; never falling.
        finished: Whether the search had the time that it needed.
    """

    def __init__(self) -> None:
        self.heads: list[int] = []
        self.errors: list[float] = []
        self.finished = True

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
        seconds: Time to search in, in which one head is tried at least. Heads left then follow in the order of the
            last round, those that it did not come to at the end.
        settle: Told before each round which heads all of its measurements have in common.

    Returns:
        The path; its last head's error is that of restricting all.
    """
    late = _timer(seconds)
    path, left = Path(), list(prior)
    everything = measure(left)
    free = _bisect(lambda n: measure(left[:n]) <= FREE * everything, len(left))
    if free:
        path.extend(left[:free], [1.0] * free, measure(left[:free]))
        left = left[free:]
    while left:
        before = path.errors[-1] if path.errors else 0.0
        settle(path.heads)
        alone: dict[int, float] = {}
        for head in left:
            if alone and late():
                break
            alone[head] = measure([*path.heads, head])
        left.sort(key=lambda head: alone.get(head, np.inf))
        path.finished = len(alone) == len(left) and (len(left) == 1 or not late())
        number = max(1, round(SHARE * len(left))) if path.finished else len(left)
        most = max(alone.values())
        risen = [max(alone.get(head, most) - before, 0.0) for head in left]
        together = everything if number == len(left) else measure([*path.heads, *left[:number]])
        while path.finished and number > 1 and together - before > 4 * sum(risen[:number]) + FREE * everything:
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

    In every round each of them is measured alone: a restricted head set free, and a global one restricted. The pairs
    that promise most are tried, and the round after begins with the swaps that were better.

    Args:
        measure: Error of restricting these heads.
        local: Heads that are restricted, the least certain last.
        rest: Heads that stay global, the least certain first.
        seconds: Time to search in.

    Returns:
        As many restricted heads.
    """
    late = _timer(seconds)
    local, rest = list(local), list(rest)
    best, better = measure(local), True
    while better and not late():
        better = False
        in_time = partial(takewhile, lambda head: not late())
        freed = {head: measure([h for h in local if h != head]) for head in in_time(local[-BORDER:])}
        added = {head: measure([*local, head]) for head in in_time(rest[:BORDER])}
        pairs = sorted(product(freed, added), key=lambda pair: freed[pair[0]] + added[pair[1]])
        for head, other in in_time(pairs[:PAIRS]):
            if head in local and other in rest:
                swapped = [other if h == head else h for h in local]
                error = measure(swapped)
                if error < best:
                    best, better, local = error, True, swapped
                    rest[rest.index(other)] = head
    return local


def _timer(seconds: float | int | None) -> Callable[[], bool]:
    """What says whether this time is over."""
    start = time.perf_counter()
    return lambda: seconds is not None and time.perf_counter() - start > seconds


def _bisect(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that holds, if all below do."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
