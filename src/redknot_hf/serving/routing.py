"""Which replica serves a request: the one that holds most of what it needs, unless it is full."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

# Tokens of a block by which prefixes are compared; a replica tells of blocks, not of texts.
BLOCK = 64


@dataclass(frozen=True)
class Replica:
    """What a replica tells of itself, now and then; it may be some seconds old.

    Attributes:
        name: Of the replica.
        load: Requests that run and wait there.
        most: Requests that it takes; at as many it is full. `None` is no bound.
        segments: Addresses of the segments that lie in its memory, and their bytes.
        prefixes: Marks of prefixes that it keeps (`marks`).
    """

    name: str
    load: int = 0
    most: int | None = None
    segments: Mapping[str, int] = field(default_factory=dict)
    prefixes: Collection[str] = ()

    @property
    def full(self) -> bool:
        """Whether it takes no more."""
        return self.most is not None and self.load >= self.most


def ranked(replicas: Iterable[Replica], segments: Sequence[str] = (), prompt: Sequence[int] = ()) -> list[Replica]:
    """Replicas in the order in which a request should try them.

    Those that are full come last, whatever they hold: a request spills to another, which fetches the segments or reads
    them. Among the rest more bytes of the request's segments count first, then a longer common prefix of the prompt,
    then less load; the name decides what is equal, the same way everywhere.

    Args:
        replicas: As they tell of themselves.
        segments: Addresses that the request names.
        prompt: Ids of its prompt, behind the segments.
    """
    wanted, begun = frozenset(segments), marks(prompt)

    def rank(replica: Replica) -> tuple[Any, ...]:
        held = sum(replica.segments[address] for address in wanted if address in replica.segments)
        known = next((n for n in range(len(begun), 0, -1) if begun[n - 1] in replica.prefixes), 0)
        return replica.full, -held, -known, replica.load, replica.name

    return sorted(replicas, key=rank)


def marks(ids: Sequence[int], block: int = BLOCK) -> list[str]:
    """A mark for each whole number of blocks that a text begins with, which tells it from others and not what it says.

    Args:
        ids: Of the text.
        block: Tokens of a block; the same on all replicas.
    """
    digest, found = sha256(), []
    for end in range(block, len(ids) + 1, block):
        digest.update(np.array(ids[end - block : end], np.int64).tobytes())
        found.append(digest.hexdigest()[:16])
    return found
