"""Tokens on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Post:
    """Brings what a thread puts here to queues of an event loop, which is woken once for all that comes at once.

    A step gives a token to each sequence; to wake the loop for each of them would cost the step more than its own
    bookkeeping does. Made on the loop.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._left: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._woken = False

    def put(self, queue: asyncio.Queue[Any], what: Any) -> None:
        """Leaves something for a queue, from any thread.

        Raises:
            RuntimeError: The loop has ended.
        """
        self._left.append((queue, what))
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first, so that whoever puts something behind the last look wakes the loop again
        while self._left:
            queue, what = self._left.popleft()
            queue.put_nowait(what)
