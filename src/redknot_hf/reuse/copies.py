"""Segments on their way from one memory to another: copies on a stream of their own, and what waits for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .segment import Segment

# So many parts are begun ahead of the one that is asked for.
_AHEAD = 2


@dataclass(frozen=True, eq=False)
class Held:
    """A segment that some stream may still be copying.

    Attributes:
        segment: Its data may be used after `here`.
        ready: Events, each recorded behind the copy of as many layers as the others; empty if there is nothing to wait
            for. The last one is behind all.
    """

    segment: Segment
    ready: Sequence[Any] = ()

    def here(self, layer: int = -1) -> Segment:
        """The segment, usable by what the current stream does from now on; the host does not wait.

        Of a layer, if one is named, and of those before it: the others may still be on their way.
        """
        if self.ready:
            stream = torch.cuda.current_stream(self.segment.data.device)
            stream.wait_event(self.ready[self.part(layer)])
            self.segment.data.record_stream(stream)
        return self.segment

    def part(self, layer: int) -> int:
        """Which of the parts that are copied one after the other a layer is in."""
        if layer < 0 or not self.ready:
            return -1
        return layer * len(self.ready) // len(self.segment.layers)


class Copies:
    """Copies of segments on a stream of their own: the first layers of all of them, then the next ones.

    What copies in one direction the device does in the order in which it is told, whatever the streams: a few numbers
    that the model needs would wait for all bytes of all segments. So a part is begun when one shortly before it is
    asked for. Any thread may ask.

    Args:
        stream: Of the copies.
        held: Where they come from.
        targets: Where they go to, one a segment.
        parts: How many there are.
    """

    def __init__(self, stream: Any, held: Sequence[Held], targets: Sequence[Tensor], parts: int) -> None:
        self._stream, self._parts = stream, parts
        self._pairs = [(one.segment, target) for one, target in zip(held, targets, strict=True)]
        self._begun: list[list[Any]] = []  # of each part an event a segment
        self._lock = threading.Lock()

    def events(self, which: int) -> Sequence[Any]:
        """Of one segment an event a part; to ask for one begins its copy."""
        return _Events(self, which, self._parts)

    def begin(self, part: int) -> list[Any]:
        """Begins a part and those before it, if they are not; returns its events."""
        with self._lock, torch.cuda.stream(self._stream):
            while len(self._begun) <= part:
                self._begun.append([self._copy(*pair) for pair in self._pairs])
            if len(self._begun) == self._parts:
                self._pairs = []  # where they come from may be let go
        return self._begun[part]

    def _copy(self, segment: Segment, target: Tensor) -> Any:
        for where in segment.extents(len(self._begun), self._parts):
            target[where].copy_(segment.data[where], non_blocking=True)
        return self._stream.record_event()


class _Events(Sequence[Any]):
    """Events of one segment of some copies."""

    def __init__(self, copies: Copies, which: int, parts: int) -> None:
        self._copies, self._which, self._parts = copies, which, range(parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, part: Any) -> Any:
        part = self._parts[part]
        self._copies.begin(min(part + _AHEAD, self._parts[-1]))
        return self._copies.begin(part)[self._which]
