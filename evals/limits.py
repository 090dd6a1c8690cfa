"""What a gate holds a plan against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a plan must keep to.

    Attributes:
        points: Most points of score that may be lost to dense: the lower end of the 95 % interval must not pass it.
        top1: Least share of tokens that are those of dense, in points.
        kl: Most mean KL(dense || method) of a token, in nats.
    """

    points: float = 5.0
    top1: float = 95.0
    kl: float = 0.05
