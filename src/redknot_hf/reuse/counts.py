"""What a store has done so far, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock


@dataclass
class Counts:
    """What a store has done so far.

    Attributes:
        hits: Segments found, by tier: `"device"`, `"host"`, `"disk"`, `"remote"`.
        computed: Segments prefilled, and prefilled again because they were lost.
        moved: Bytes copied, by `(from, to)`.
        evicted: Segments that left a tier for others, by tier.
        lost: Segments of which the last copy left memory, and that lie nowhere else.
        damaged: Stored values that were refused: cut short, altered, foreign, or not readable.
        failed_writes: Values that could not be written.
        unreachable: Times that a remote tier was wanted and did not answer, or was left alone since it had not.
    """

    hits: Counter[str] = field(default_factory=Counter)
    computed: int = 0
    recomputed: int = 0
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    evicted: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    damaged: int = 0
    failed_writes: int = 0
    unreachable: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, name: str, by: int = 1, tier: str | None = None) -> None:
        """Adds to one of the counts, or to a tier's part of it; from any thread."""
        with self._lock:
            if tier is None:
                setattr(self, name, getattr(self, name) + by)
            elif by:
                getattr(self, name)[tier] += by

    def __str__(self) -> str:
        hits = ", ".join(f"{n} from {name}" for name, n in self.hits.items()) or "none"
        moved = ", ".join(f"{n / 2**20:.1f} MiB {a} to {b}" for (a, b), n in self.moved.items()) or "nothing"
        again = f", {self.recomputed} again" if self.recomputed else ""
        return f"{self.computed} computed{again}, hits {hits}, moved {moved}"
