"""An engine's life: steps on a thread of its own, or by whoever asks for them, until it is told to end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Thread, current_thread
from typing import Any, TypeVar

from .inbox import Inbox
from .request import State

Result = TypeVar("Result")
Mine = TypeVar("Mine", bound="Loop")


class Loop(ABC):
    """Steps for as long as there is work.

    Attributes:
        error: What ended it, if something did.
        steps: How many had work.

    Args:
        queue: Requests that wait at most.
    """

    def __init__(self, queue: int) -> None:
        self.error: BaseException | None = None
        self._inbox = Inbox(queue)
        self._thread: Thread | None = None
        self._begun = self._stopping = False
        self.steps = 0

    @abstractmethod
    def step(self) -> bool:
        """Does one step; whether there was work."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether there is nothing to do."""

    @abstractmethod
    def _end_all(self, state: State, reason: str, error: BaseException | None) -> None:
        """Ends all requests."""

    def start(self: Mine) -> Mine:
        """Serves on a thread of its own, until `shutdown`."""
        if self._thread is None:
            self._thread = Thread(target=self._loop, name="redknot engine", daemon=True)
            self._thread.start()
        return self

    def drain(self, timeout: float | int | None = None) -> bool:
        """Takes no more requests and waits until all have ended; whether they have."""
        self._inbox.close("it is being shut down")
        end = None if timeout is None else time.monotonic() + timeout
        while not self.idle and not self.error and (end is None or time.monotonic() < end):
            if self._thread is None:
                self.step()
            else:
                time.sleep(0.005)
        return self.idle

    def shutdown(self, timeout: float | int | None = 0) -> None:
        """Ends the engine: waits `timeout` seconds for requests to end, then gives them up."""
        if timeout != 0:
            self.drain(timeout)
        self._stopping = True
        self._inbox.close("it is being shut down")
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join()
        self._inbox.refuse()
        self._end_all(State.CANCELLED, "shutdown", None)

    def between_steps(self, work: Callable[[], Result]) -> Result:
        """Has something done when no step is under way, such as forward passes of others, and waits for it.

        Where ranks share the model, it must not run it: the others would not.

        Raises:
            RuntimeError: The engine has ended.
        """
        if self._thread is None or self._thread is current_thread():
            return work()
        return self._inbox.call(work).result()

    def __enter__(self: Mine) -> Mine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return self.error is None and not self._stopping and (self._thread is None or self._thread.is_alive())

    def _serves(self) -> bool:
        return self._thread is not None or self._begun

    def _loop(self) -> None:
        while not self._stopping:
            try:
                busy = self.step()
            except Exception as e:  # not one request's own: nothing can be trusted any more
                self.error = e
                self._inbox.close(e)
                self._inbox.refuse()
                self._end_all(State.FAILED, "error", e)
                return
            if not busy and not self._stopping:
                self._inbox.wait(self._patience())

    def _patience(self) -> Any:
        """Seconds that an idle engine waits for requests before it looks after those it has."""
        return 0.2
