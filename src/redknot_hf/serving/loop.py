"""An engine's life: steps on a thread of its own, or by whoever asks for them, until it is told to end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, Thread, current_thread, get_ident
from typing import Any, TypeVar

from .inbox import Inbox
from .request import Request, State

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
        # Held by whoever takes a step or ends the engine, and which thread that is.
        self._stepping = Lock()
        self._within: int | None = None

    @abstractmethod
    def step(self) -> bool:
        """Does one step; whether there was work."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether there is nothing to do."""

    @abstractmethod
    def _end_all(self, state: State, reason: str, error: BaseException | None) -> None:
        """Ends all requests, and lets go of what served them; a second call changes nothing."""

    def start(self: Mine) -> Mine:
        """Serves on a thread of its own, until `shutdown`."""
        if self._thread is None:
            self._thread = Thread(target=self._loop, name="redknot engine", daemon=True)
            self._thread.start()
        return self

    def drain(self, timeout: float | int | None = None) -> bool:
        """Takes no more requests and waits until all have ended; whether they have.

        Raises:
            RuntimeError: It is called from within a step, which would wait for itself.
        """
        self._check_outside("drain")
        self._inbox.close("it is being shut down")
        end = None if timeout is None else time.monotonic() + timeout
        while not self.idle and not self.error and (end is None or time.monotonic() < end):
            if self._thread is None:
                self.step()
            else:
                time.sleep(0.005)
        return self.idle

    def shutdown(self, timeout: float | int | None = 0) -> None:
        """Ends the engine: waits `timeout` seconds for requests to end, then gives them up.

        Afterwards it holds no memory of a device any more, whoever still holds it or its requests. Called from within
        a step, by a callback of a request, it ends the engine when the step is over.

        Raises:
            RuntimeError: It is to wait, from within a step.
        """
        if timeout != 0:
            self.drain(timeout)
        self._stopping = True
        self._inbox.close("it is being shut down")
        if self._within == get_ident():
            return
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join()
        with self._turn():
            pass  # and ends what is being stopped

    def _until_ended(self, requests: Sequence[Request], progress: bool) -> None:
        """Takes steps, or leaves that to the engine's thread, until all requests have ended; shows a bar if wanted."""
        from tqdm.auto import tqdm

        with tqdm(total=len(requests), unit="request", disable=not progress) as bar:
            for done, request in enumerate(requests):
                while not request.state.ended:
                    if self._thread is None:
                        self.step()
                    else:
                        time.sleep(0.001)
                bar.update(done + 1 - bar.n)

    def between_steps(self, work: Callable[[], Result]) -> Result:
        """Has something done when no step is under way, such as forward passes of others, and waits for it.

        Where ranks share the model, it must not run it: the others would not.

        Raises:
            RuntimeError: The engine has ended.
        """
        if self._within == get_ident():
            return work()
        if self._thread is None:
            with self._turn():
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
        return self._within != get_ident() and (self._thread is not None or self._begun)

    def _check_outside(self, name: str) -> None:
        """Checks that whoever waits for steps is not within one, which would never end."""
        if self._within == get_ident():
            raise RuntimeError(
                f"engine.{name}() waits for steps, and was called from within one, by what a request calls back or is "
                "made of: call it from another thread, or engine.shutdown(), which ends the engine behind the step"
            )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Lets one thread at a time take a step, and behind it ends what is being stopped."""
        with self._stepping:
            self._within = get_ident()
            try:
                yield
                if self._stopping:
                    self._inbox.refuse()
                    self._end_all(State.CANCELLED, "shutdown", None)
            finally:
                self._within = None

    def _loop(self) -> None:
        while not self._stopping:
            try:
                busy = self.step()
            except Exception as e:  # not one request's own: nothing can be trusted any more
                self.error = e
                self._inbox.close(e)
                with self._turn():
                    self._inbox.refuse()
                    self._end_all(State.FAILED, "error", e)
                return
            if not busy and not self._stopping:
                self._inbox.wait(self._patience())

    def _patience(self) -> Any:
        """Seconds that an idle engine waits for requests before it looks after those it has."""
        return 0.2
