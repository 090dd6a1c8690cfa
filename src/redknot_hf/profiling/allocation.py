"""Bytes where they count: of every head's choices those whose errors sum up to the least, for the bytes there are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

Table = Float[np.ndarray, "heads choices"]


@dataclass(frozen=True)
class Step:
    """A head's next dearer choice.

    Attributes:
        head, choice: Which head takes which.
        cost: Bytes more than its choice before.
        gain: Error less.
    """

    head: int
    choice: int
    cost: float
    gain: float


def steps(costs: Table, errors: Table) -> tuple[Int[np.ndarray, " heads"], list[Step]]:
    """The cheapest choice of every head, and the steps from there in the order in which they are worth their bytes.

    Taken in this order, the heads have at every step the least sum of errors that their bytes can buy: a head's
    choices are those on the lower convex hull of its errors over its bytes (Lagrange multipliers, all at once).
    """
    first, found = [], []
    for head, (cost, error) in enumerate(zip(costs, errors, strict=True)):
        hull = _hull(cost, error)
        first.append(hull[0])
        for a, b in pairwise(hull):
            found.append(Step(head, b, float(cost[b] - cost[a]), float(error[a] - error[b])))
    order = sorted(range(len(found)), key=lambda i: (-found[i].gain / found[i].cost, i))
    return np.array(first), [found[i] for i in order]


def allocate(costs: Table, errors: Table, budget: float) -> Int[np.ndarray, " heads"]:
    """The choice of every head, within a budget.

    Args:
        costs: Bytes of every choice.
        errors: What it costs otherwise; they add up.
        budget: Bytes of all heads together.

    Raises:
        ValueError: The cheapest choices exceed the budget.
    """
    picks, order = steps(costs, errors)
    heads = np.arange(len(costs))
    if costs[heads, picks].sum() > budget:
        raise ValueError(f"the cheapest choices take {costs[heads, picks].sum():.6g}, of {budget:.6g}")
    left = budget - costs[heads, picks].sum()
    for step in order:
        # Behind the first step that is too dear, cheaper ones of other heads may still fit.
        extra = costs[step.head, step.choice] - costs[step.head, picks[step.head]]
        if 0 < extra <= left:
            picks[step.head] = step.choice
            left -= extra
    return _filled(costs, errors, picks, left)


def _filled(costs: Table, errors: Table, picks: Int[np.ndarray, " heads"], left: float) -> Int[np.ndarray, " heads"]:
    """Spends what is left, on the choice that gains most, as long as one fits."""
    heads = np.arange(len(costs))
    while True:
        extra = costs - costs[heads, picks][:, None]
        gain = np.where(extra <= left, errors[heads, picks][:, None] - errors, 0.0)
        head, choice = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[head, choice] <= 0:
            return picks
        left -= extra[head, choice]
        picks[head] = choice


def _hull(cost: Float[np.ndarray, " choices"], error: Float[np.ndarray, " choices"]) -> list[int]:
    """Choices on the lower convex hull, from the cheapest to the one of least error."""
    hull: list[int] = []
    for choice in np.lexsort((error, cost)).tolist():
        if hull and error[choice] >= error[hull[-1]]:
            continue
        while len(hull) > 1 and _above(cost, error, hull[-2], hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _above(cost: Float[np.ndarray, " choices"], error: Float[np.ndarray, " choices"], a: int, b: int, c: int) -> bool:
    """Whether the choice in the middle lies on or above the line through the others."""
    return bool((error[a] - error[b]) * (cost[c] - cost[a]) <= (error[a] - error[c]) * (cost[b] - cost[a]))
