"""Parked prefixes: forks of what was read, kept for the next request that begins alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

Ids = Int[np.ndarray, " ids"]


@dataclass(eq=False)
class Parked:
    """A prefix.

    Attributes:
        ids: What was read.
        cache: A fork that holds it; pages are shared with whoever wrote them.
        nbytes: Of its pages, if it shared none.
    """

    ids: Ids
    cache: Any
    nbytes: int

    @property
    def tokens(self) -> int:
        """How many."""
        return len(self.ids)


class Prefixes:
    """Parked prefixes, found by their first block of tokens, and let go least recently used first.

    A ring holds what its position says, so a prefix is of use to the end of what it holds, or as far back as rings
    still reach: a page at least, and anywhere where all heads keep everything.

    Args:
        most: Bytes of all; 0 keeps none.
        block: Tokens of a block; shorter prefixes are not kept.
        reaches: Whether a cache can be cut back by so many tokens.
    """

    def __init__(self, most: int, block: int, reaches: Callable[[Any, int], bool]) -> None:
        self.most, self.block, self.reaches = most, block, reaches
        self.nbytes = 0
        self.hit_tokens = self.asked_tokens = 0
        self._entries: OrderedDict[bytes, Parked] = OrderedDict()
        self._blocks: dict[bytes, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int]) -> tuple[Parked, int] | None:
        """The prefix that most of the tokens begin with, and how many of them; the last one is left to be read."""
        self.asked_tokens += len(tokens)
        best: tuple[Parked, int] | None = None
        if len(tokens) > self.block:
            ids = np.array(tokens[:-1], np.int64)
            for key in self._blocks.get(ids[: self.block].tobytes(), ()):
                entry = self._entries[key]
                common = _common(entry.ids, ids)
                if common > (best[1] if best else 0) and self.reaches(entry.cache, entry.tokens - common):
                    best = entry, common
        if best is not None:
            self._entries.move_to_end(best[0].ids.tobytes())
            self.hit_tokens += best[1]
        return best

    def wants(self, tokens: Sequence[int]) -> bool:
        """Whether a prefix is worth keeping, and is not yet kept."""
        return (
            bool(self.most) and len(tokens) >= self.block and np.array(tokens, np.int64).tobytes() not in self._entries
        )

    def add(self, tokens: Sequence[int], cache: Any, nbytes: int) -> list[Parked]:
        """Keeps a prefix; gives those that had to go for it."""
        ids = np.array(tokens, np.int64)
        entry = Parked(ids, cache, nbytes)
        if nbytes > self.most:
            return [entry]
        gone = []
        while self.nbytes + nbytes > self.most and (old := self.pop()):
            gone.append(old)
        self._entries[ids.tobytes()] = entry
        self._blocks.setdefault(ids[: self.block].tobytes(), []).append(ids.tobytes())
        self.nbytes += nbytes
        return gone

    def pop(self) -> Parked | None:
        """Takes out the prefix that was used least recently."""
        if not self._entries:
            return None
        key, entry = self._entries.popitem(last=False)
        first = entry.ids[: self.block].tobytes()
        self._blocks[first].remove(key)
        if not self._blocks[first]:
            del self._blocks[first]
        self.nbytes -= entry.nbytes
        return entry


def _common(held: Int[np.ndarray, " held"], asked: Int[np.ndarray, " asked"]) -> int:
    count = min(len(held), len(asked))
    differ = np.flatnonzero(held[:count] != asked[:count])
    return int(differ[0]) if len(differ) else count
