"""The way of one prompt through replicas: if one goes, the next goes on with the answers where it left them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import ReplicaUnavailableError

from redknot_hf.serving.request import Request, State

from .errand import Errand, News, Want

log = logging.getLogger("redknot_hf.serving")

# What Ray raises of a replica that is gone, or that its controller has just ended.
GONE = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, ReplicaUnavailableError)
# Replicas that an answer is asked of, at most.
TRIES = 5


class GoneError(RuntimeError):
    """A replica says that its engine has ended."""


@dataclass
class Flight:
    """Answers to one prompt, and the requests that they are told to.

    Attributes:
        send: Sends an errand to the replica that a want leads to, and gives what comes back.
        prepare: Awaited first, and given the errand; what it returns is sent.
        observe: Told of tokens and ends, as an engine tells of them, and of answers that went elsewhere.
        requests: One for each answer.
        want, errand: What is asked, at first.
    """

    send: Callable[[Want, Errand], Any]
    prepare: Callable[[Errand], Any]
    observe: Callable[[str, float], None]
    requests: Sequence[Request]
    want: Want
    errand: Errand

    async def run(self) -> None:
        """Brings all answers to their ends."""
        deadline = self.requests[0].deadline
        try:
            async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), 0)):
                self.errand = await self.prepare(self.errand)
                await self._fly(self.requests, self.errand, frozenset(), TRIES)
        except TimeoutError:
            self._end(self.requests, State.CANCELLED, "deadline")
        except asyncio.CancelledError:
            self._end(self.requests, State.CANCELLED, "cancelled")
        except Exception as e:  # of what prepares; nobody waits for ever
            self._end(self.requests, State.FAILED, "error", e)

    async def _fly(self, requests: Sequence[Request], errand: Errand, avoid: frozenset[str], tries: int) -> None:
        """Has requests answered by one replica, and those that it leaves by others."""
        seen: list[str] = []
        try:
            await self._follow(self.send(replace(self.want, avoid=avoid), errand), requests, seen)
            return
        except (*GONE, GoneError) as e:
            gone = e
        except Exception as e:
            self._end(requests, State.FAILED, "error", e)
            return
        if tries == 1:
            self._end(requests, State.FAILED, "error", gone)
            return
        left = [request for request in requests if not request.state.ended]
        log.warning("a replica is gone (%s): %d answers go on elsewhere", type(gone).__name__, len(left))
        self.observe("moved", len(left))
        each = [replace(errand, n=1, sampling=one.sampling, answered=tuple(one.ids)) for one in left]
        avoid |= {*seen}
        await asyncio.gather(*(self._fly([one], its, avoid, tries - 1) for one, its in zip(left, each, strict=True)))

    async def _follow(self, stream: Any, requests: Sequence[Request], seen: list[str]) -> None:
        """Tells requests what comes, until all have ended; who sends it is put into `seen`."""
        ended = lambda: all(request.state.ended for request in requests)  # noqa: E731
        broken = False
        try:
            async for news in stream:
                if isinstance(news, str):
                    seen.append(news)
                    continue
                for one in news:
                    broken |= self._tell(requests[one.index], one)
                if broken and ended():
                    break
        finally:
            if broken or not ended():  # it would go on, for nobody
                stream.cancel()
        if not ended():
            raise GoneError("a replica's answers ended before they were whole")

    def _tell(self, request: Request, news: News) -> bool:
        """Tells a request; whether what it calls back has raised, by which it has ended, and no other."""
        if request.state.ended:
            return True
        if news.reason == "shutdown":
            raise GoneError(news.error)
        request.cached = max(request.cached, news.cached)
        if request.state is State.WAITING:
            request.state = State.DECODING
        for token in news.tokens:
            before = request.last_token
            try:
                request.emit(token)
            except Exception as e:
                self._end_one(request, State.FAILED, "error", e)
                return True
            since = request.arrived if before is None else before
            self.observe("first" if before is None else "next", (request.last_token or since) - since)
        if news.state is not None:
            error = RuntimeError(news.error) if news.state is State.FAILED else None
            self._end_one(request, news.state, news.reason, error)
        return False

    def _end(self, requests: Sequence[Request], state: State, reason: str, error: BaseException | None = None) -> None:
        for request in requests:
            if not request.state.ended:
                self._end_one(request, state, reason, error)

    def _end_one(self, request: Request, state: State, reason: str, error: BaseException | None) -> None:
        request.end(state, reason, error)
        self.observe(reason, 1)
