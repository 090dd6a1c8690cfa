"""Parked prefixes: forks of what was read, kept for the next request that begins alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

Ids = Int[np.ndarray, " ids"]
Key = tuple[Hashable, bytes]


@dataclass(eq=False)
class Parked:
    """A prefix.

    Attributes:
        ids: What was read.
        cache: A fork that holds it; pages are shared with whoever wrote them.
        nbytes: Of its pages, if it shared none.
        kind: How it came to be held.
    """

    ids: Ids
    cache: Any
    nbytes: int
    kind: Hashable = ()

    @property
    def tokens(self) -> int:
        """How many."""
        return len(self.ids)


class Prefixes:
    """Parked prefixes, found by their first block of tokens, and let go least recently used first.

    A ring holds what its position says, so a prefix is of use to the end of what it holds, or as far back as rings
    still reach: a page at least, and anywhere where all heads keep everything. The same tokens have other keys and
    values where some were taken from stored segments: such prefixes are of another kind than those that were read.

    Args:
        most: Bytes of all; 0 keeps none.
        block: Tokens of a block; shorter prefixes are not kept.
        reaches: Whether a cache can be cut back by so many tokens.
    """

    def __init__(self, most: int, block: int, reaches: Callable[[Any, int], bool]) -> None:
        self.most, self.block, self.reaches = most, block, reaches
        self.nbytes = 0
        self.hit_tokens = self.asked_tokens = 0
        self._entries: OrderedDict[Key, Parked] = OrderedDict()
        self._blocks: dict[Key, list[Key]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def held(self, kind: Hashable = ()) -> list[Parked]:
        """All prefixes of a kind, the least recently used first; from any thread."""
        return [entry for entry in list(self._entries.values()) if entry.kind == kind]

    def find(self, tokens: Sequence[int], kind: Hashable = ()) -> tuple[Parked, int] | None:
        """The prefix of a kind that most of the tokens begin with, and how many; the last one is left to be read."""
        self.asked_tokens += len(tokens)
        best: tuple[Parked, int] | None = None
        if len(tokens) > self.block:
            ids = np.array(tokens[:-1], np.int64)
            for key in self._blocks.get(self._block(ids, kind), ()):
                entry = self._entries[key]
                common = _common(entry.ids, ids)
                if common > (best[1] if best else 0) and self.reaches(entry.cache, entry.tokens - common):
                    best = entry, common
        if best is not None:
            self._entries.move_to_end(_key(best[0].ids, kind))
            self.hit_tokens += best[1]
        return best

    def wants(self, tokens: Sequence[int], kind: Hashable = ()) -> bool:
        """Whether a prefix is worth keeping, and is not yet kept."""
        worth = bool(self.most) and len(tokens) >= self.block
        return worth and _key(np.array(tokens, np.int64), kind) not in self._entries

    def add(self, tokens: Sequence[int], cache: Any, nbytes: int, kind: Hashable = ()) -> list[Parked]:
        """Keeps a prefix; gives those that had to go for it."""
        ids = np.array(tokens, np.int64)
        entry = Parked(ids, cache, nbytes, kind)
        if nbytes > self.most:
            return [entry]
        gone = []
        while self.nbytes + nbytes > self.most and (old := self.pop()):
            gone.append(old)
        self._entries[_key(ids, kind)] = entry
        self._blocks.setdefault(self._block(ids, kind), []).append(_key(ids, kind))
        self.nbytes += nbytes
        return gone

    def pop(self) -> Parked | None:
        """Takes out the prefix that was used least recently."""
        if not self._entries:
            return None
        key, entry = self._entries.popitem(last=False)
        first = self._block(entry.ids, entry.kind)
        self._blocks[first].remove(key)
        if not self._blocks[first]:
            del self._blocks[first]
        self.nbytes -= entry.nbytes
        return entry

    def _block(self, ids: Ids, kind: Hashable) -> Key:
        return _key(ids[: self.block], kind)


def _key(ids: Ids, kind: Hashable) -> Key:
    return kind, ids.tobytes()


def _common(held: Int[np.ndarray, " held"], asked: Int[np.ndarray, " asked"]) -> int:
    count = min(len(held), len(asked))
    differ = np.flatnonzero(held[:count] != asked[:count])
    return int(differ[0]) if len(differ) else count
