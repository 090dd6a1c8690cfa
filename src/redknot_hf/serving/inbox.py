"""Where threads leave their requests for the engine's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from threading import Condition
from typing import Any

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
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
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

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Leaves something to be done by the engine's thread, from any other.

        Raises:
            RuntimeError: The inbox is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the engine does nothing any more: {self._closed}")
            self._calls.append((Future(), work))
            self._changed.notify_all()
            return self._calls[-1][0]

    def answer(self) -> None:
        """Does what was left to be done; what that raises goes to whoever left it."""
        while self._calls:
            future, work = self._calls.popleft()
            try:
                future.set_result(work())
            except BaseException as e:
                future.set_exception(e)

    def refuse(self) -> None:
        """Tells whoever waits for something to be done that it will not be."""
        while self._calls:
            self._calls.popleft()[0].set_exception(RuntimeError(f"the engine does nothing any more: {self._closed}"))

    def wait(self, seconds: float | int) -> None:
        """Waits until something lies here, the inbox is closed, or the time is over."""
        with self._changed:
            if not (self._groups or self._calls):
                self._changed.wait(seconds)

    def close(self, why: str | BaseException) -> None:
        """Lets nothing in any more."""
        with self._changed:
            self._closed = self._closed or why
            self._changed.notify_all()
