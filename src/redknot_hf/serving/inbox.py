"""Where threads leave their requests for the engine's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Condition

from .scheduler import Sequence


class QueueFullError(RuntimeError):
    """Too many requests wait."""


class Inbox:
    """Requests that the engine has not come to yet; those of one prompt lie together.

    Args:
        most: Requests that may wait, those included that the engine knows of.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._groups: deque[list[Sequence]] = deque()
        self._closed: str | BaseException | None = None
        self._changed = Condition()

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._groups))

    def put(self, sequences: list[Sequence], waiting: int) -> None:
        """Leaves requests, from any thread.

        Args:
            sequences: Of one prompt.
            waiting: How many others wait that the engine knows of.

        Raises:
            RuntimeError: The inbox is closed.
            QueueFullError: Too many wait.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the engine takes no requests any more: {self._closed}")
            waiting += len(self)
            if waiting + len(sequences) > self.most:
                raise QueueFullError(f"{waiting} requests wait, and at most {self.most} may: try again later")
            self._groups.append(sequences)
            self._changed.notify_all()

    def take(self) -> Iterator[Sequence]:
        """What lies here, first come first; those of a prompt lie here until all of them were taken."""
        while self._groups:
            yield from self._groups[0]
            with self._changed:
                self._groups.popleft()

    def wait(self, seconds: float | int) -> None:
        """Waits until something lies here, the inbox is closed, or the time is over."""
        with self._changed:
            if not self._groups:
                self._changed.wait(seconds)

    def close(self, why: str | BaseException) -> None:
        """Lets nothing in any more."""
        with self._changed:
            self._closed = self._closed or why
            self._changed.notify_all()
