"""What of a context to recompute for a question: where words stand that both share, the rare ones above all.

Tokens are compared, no model is asked. A window of the context counts each token of the question once, by how rare it
is in the context (inverse document frequency, as BM25 has it); around the best windows spans are taken, until their
tokens are as many as may be. Since rare tokens count most and others still count, what answers the question comes
first, and then what is put like it and competes with it: both have to be right for the model to tell them apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int

from .schedule import Reused

# Tokens that are looked at together, over which that is evened out, and of a span before and from its middle on.
_WINDOW, _EVEN = 24, 9
_BEFORE, _AFTER = 8, 16
# Of a sum of weights, what rounding may leave of zero.
_NOTHING = 1e-6

Places = Int[np.ndarray, " chosen"]


def choose(parts: Sequence[Reused], question: Sequence[int], share: float | int) -> tuple[Reused, ...]:
    """Says of each segment of a context which tokens behind its boundary are recomputed for a question.

    Args:
        parts: The segments in order.
        question: Token ids.
        share: How much of what is not right as stored may be recomputed so, 0 to 1.

    Raises:
        ValueError: The share is none.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: give a share from 0 to 1")
    ids = tuple(i for part in parts for i in part.ref.ids)
    context, fixed = np.array(ids), np.zeros(len(ids), bool)
    right = 0
    for part in parts:
        here = len(part.ref) if part.ref.prefix == ids[: part.start] else 0
        right += here
        fixed[part.start :][: here or part.boundary] = True
    places = places_for(context, question, round(share * (len(ids) - right)), fixed)
    ends = np.searchsorted(places, [part.start + len(part.ref) for part in parts])
    of_part = np.split(places, ends[:-1])
    return tuple(
        replace(part, chosen=tuple((mine - part.start).tolist())) for part, mine in zip(parts, of_part, strict=True)
    )


def places_for(
    context: Int[np.ndarray, " tokens"],
    question: Sequence[int],
    most: int,
    fixed: Bool[np.ndarray, " tokens"] | None = None,
) -> Places:
    """Positions of a context to recompute for a question, in order.

    Args:
        context: Its token ids.
        question: Ids of the question.
        most: How many positions there may be; fewer where question and context share less.
        fixed: Tokens that need not be.
    """
    score = _near(_shared(context, question), _EVEN)
    best = np.argsort(-score, kind="stable")[: np.count_nonzero(score > _NOTHING)]
    fixed = np.zeros(len(context), bool) if fixed is None else fixed

    def spans(count: int) -> Bool[np.ndarray, " tokens"]:
        """Spans around so many of the best places."""
        middle = np.zeros(len(context) + _BEFORE + _AFTER)
        middle[best[:count] + _AFTER - 1] = 1
        sums = np.concatenate([[0], middle.cumsum()])
        return (sums[_BEFORE + _AFTER :][: len(context)] > sums[: len(context)]) & ~fixed

    # Spans grow with their number, so the most that fit are found by halving.
    count = bisect_right(range(len(best) + 1), most, key=lambda n: np.count_nonzero(spans(n))) - 1
    return np.flatnonzero(spans(count))


def _shared(context: Int[np.ndarray, " tokens"], question: Sequence[int]) -> Float[np.ndarray, " tokens"]:
    """For the window around each place, the weight of the tokens that it shares with the question."""
    steps, end = np.zeros(len(context) + 1), len(context)
    for token in dict.fromkeys(question):
        at = np.flatnonzero(context == token)
        first, stop = np.maximum(at + 1 - _WINDOW // 2, 0), np.minimum(at + 1 + _WINDOW // 2, end)
        first[1:] = np.maximum(first[1:], stop[:-1])  # windows that overlap count once
        weight = np.log1p(end / max(len(at), 1))
        np.add.at(steps, first, weight)
        np.add.at(steps, stop, -weight)
    return steps.cumsum()[:end]


def _near(values: Float[np.ndarray, " tokens"], width: int) -> Float[np.ndarray, " tokens"]:
    """Sums over windows of a width, around each place."""
    before = width // 2
    sums = np.concatenate([np.zeros(before + 1), values.cumsum(dtype=float), np.full(width, values.sum())])
    return sums[width:][: len(values)] - sums[: len(values)]
