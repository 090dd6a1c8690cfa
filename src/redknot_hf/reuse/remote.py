"""A shelf that may go away: what asks it while it does not answer learns so at once, and it is asked again later."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from .encoding import Buffer, SegmentFileError, Text, plain_memory
from .segment import Segment
from .shelf import Entry, Shelf

Found = TypeVar("Found")

# Seconds that a shelf which did not answer is left alone.
RETRY = 5.0
# Errors that are answers: of the place about one value, its rights or its room.
_ANSWERS = (FileNotFoundError, PermissionError, SegmentFileError)


class UnreachableError(OSError):
    """A remote shelf does not answer.

    Attributes:
        news: Whether it did until now.
    """

    def __init__(self, message: str, news: bool) -> None:
        super().__init__(message)
        self.news = news


class Remote(Shelf):
    """Another machine's shelf. Whatever its driver raises becomes `UnreachableError`, unless it is an answer.

    After a failure it is left alone for `retry` seconds, so that a machine that hangs costs its time-out once in a
    while and not with every segment.

    Args:
        shelf: What is asked.
        retry: Seconds.
    """

    def __init__(self, shelf: Shelf, retry: float | int = RETRY) -> None:
        self.shelf, self.retry = shelf, retry
        self.name, self.url = shelf.name, shelf.url
        self._until = 0.0
        self._gone: str | None = None

    def write(self, segment: Segment, *, durable: bool = True) -> list[str]:
        """See `Shelf`."""
        return self._asked(lambda: self.shelf.write(segment, durable=durable))

    def read(self, wanted: Segment, buffer: Buffer = plain_memory) -> Segment:
        """See `Shelf`."""
        return self._asked(lambda: self.shelf.read(wanted, buffer))

    def text_of(self, address: str) -> Text | None:
        """See `Shelf`."""
        return self._asked(lambda: self.shelf.text_of(address))

    def remove(self, address: str) -> None:
        """Deletes a segment, if it is there."""
        self._asked(lambda: self.shelf.remove(address))

    def __contains__(self, address: str) -> bool:
        return self._asked(lambda: address in self.shelf)

    def entries(self) -> list[Entry]:
        """What lies there, whoever wrote it, the least recently used first."""
        return self._asked(self.shelf.entries)

    def _asked(self, ask: Callable[[], Found]) -> Found:
        if self._gone is not None and time.monotonic() < self._until:
            raise UnreachableError(self._gone, news=False)
        try:
            found = ask()
        except _ANSWERS:
            self._gone = None
            raise
        except Exception as e:
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:
                raise
            news, self._gone = self._gone is None, f"{self.url} does not answer ({type(e).__name__}: {e})"
            self._until = time.monotonic() + self.retry
            raise UnreachableError(self._gone, news) from e
        self._gone = None
        return found
