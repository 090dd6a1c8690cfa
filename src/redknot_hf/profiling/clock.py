"""The time that a caller gives for a whole run."""

from __future__ import annotations

import time


class Clock:
    """What is left of it.

    Args:
        seconds: From now on; `None` if there is no end.
    """

    def __init__(self, seconds: float | int | None) -> None:
        self.start = time.perf_counter()
        self.seconds = float("inf") if seconds is None else float(seconds)

    @property
    def taken(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def left(self, reserve: float = 0.0) -> float:
        """Seconds left, when some are kept for later; not below 0."""
        return max(0.0, self.seconds - self.taken - reserve)
