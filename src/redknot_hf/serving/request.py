"""A request: tokens to read, how to choose what follows them, and what has come of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import count
from math import isnan
from numbers import Integral, Real
from threading import Condition
from typing import Any

_NUMBERS = count()


class State(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    READING = "reading"
    DECODING = "decoding"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing will come any more."""
        return self in (State.DONE, State.FAILED, State.CANCELLED)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when they end; each step in the order of transformers' `generate`.

    Attributes:
        max_new_tokens: At most so many.
        temperature: 0 takes the most likely token; others divide the logits.
        top_k, top_p, min_p: Which tokens are drawn from, as in `generate`; 0, 1 and 0 leave all.
        repetition_penalty: Of tokens that prompt or answer hold, as in `generate`.
        presence_penalty, frequency_penalty: Taken from the logits of tokens in the answer: once, and each time.
        logit_bias: Added to the logits of tokens.
        seed: Of this request's own draws, which then are those of `torch.manual_seed(seed)` and `generate`.
        processors: Transformers' `LogitsProcessor`s (or any callable of ids and scores), asked before the temperature.
        stop_ids: Tokens that end the answer, and are its last; besides the model's own.
        stop: Strings that end the answer, which needs the engine's tokenizer.
        ignore_eos: The model's own ends do not end it.
        logprobs: Gives log-probabilities of the chosen and of so many of the likeliest tokens; `None` gives none.
    """

    max_new_tokens: int = 128
    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    logit_bias: Mapping[int, float | int] = field(default_factory=dict)
    seed: int | None = None
    processors: Sequence[Callable[..., Any]] = ()
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in _BOUNDS:
            value: Any = getattr(self, name)
            kind: Any = Integral if name in _WHOLE else Real
            if not isinstance(value, kind) and not (value is None and name in _OPTIONAL):
                raise TypeError(f"{name}={value!r}: give {'a whole number' if kind is Integral else 'a number'}")
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}={value}: give a number from {least:g} to {most:g}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: give a number above 0")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop={self.stop!r}: give a list of strings, none of them empty")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, Integral) or not isinstance(bias, Real) or isnan(bias):
                raise ValueError(f"logit_bias={{{token!r}: {bias!r}}}: give a number for each id of a token")

    @cached_property
    def plain(self) -> bool:
        """Whether the largest logit is taken as it is."""
        return self.temperature == 0 and not self.shaped

    @cached_property
    def shaped(self) -> bool:
        """Whether logits are changed by what the request has seen, or asks."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return bool(any(penalties) or self.logit_bias or self.processors)


_INFINITE = float("inf")
_WHOLE = ("max_new_tokens", "top_k", "seed", "logprobs")
_OPTIONAL = ("seed", "logprobs")
_BOUNDS = (
    ("max_new_tokens", 1, _INFINITE),
    ("temperature", 0, _INFINITE),
    ("top_k", 0, _INFINITE),
    ("top_p", 1e-9, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 0, _INFINITE),
    ("presence_penalty", -100, 100),
    ("frequency_penalty", -100, 100),
    ("logprobs", 0, 100),
    ("seed", -(1 << 63), (1 << 64) - 1),
)


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        id: Which.
        logprob: Of it, before anything shaped the logits; `None` if not asked.
        top: The likeliest tokens and their log-probabilities.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Request:
    """What `Engine.submit` returns: iterate over it, `await` or `async for` it, or ask for its `result()`.

    Attributes:
        prompt: Ids that are read.
        sampling: How tokens are chosen.
        priority: Larger ones are served before smaller ones; equal ones first come, first served.
        deadline: When it is given up, by `time.monotonic`; `None` never.
        state: Where it stands.
        tokens: The answer so far, `Token`s.
        reason: Why it ended: `"stop"`, `"length"`, `"cancelled"`, `"deadline"`, `"shutdown"` or `"error"`.
        error: What went wrong, if it failed.
        arrived, first_token, last_token: When, by `time.monotonic`; `None` before it has come.
        segments: How stored segments came into the prompt, which begins with them (`Reused`); none as a rule.
        cached: Tokens of the prompt that a parked prefix or stored segments held.
        preempted: How often its pages were taken.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        priority: int = 0,
        timeout: float | int | None = None,
        callback: Callable[[Request, Token | None], Any] | None = None,
    ) -> None:
        if not isinstance(priority, Integral):
            raise TypeError(f"priority={priority!r}: give a whole number")
        self.number = next(_NUMBERS)
        self.prompt, self.sampling, self.priority = list(prompt), sampling, priority
        self.arrived = time.monotonic()
        self.deadline = None if timeout is None else self.arrived + timeout
        self.first_token = self.last_token = None
        self.state, self.reason, self.error = State.WAITING, None, None
        self.tokens: list[Token] = []
        self.cached = self.preempted = 0
        self.segments: tuple[Any, ...] = ()
        # What the prompt begins with, made elsewhere: a span, or what makes it when the engine comes to the request.
        self.source: Any = None
        self.cancelling = False
        # Whether anybody takes steps, as far as the engine knows.
        self.served: Callable[[], bool] = lambda: True
        self._changed = Condition()
        self._listeners = [] if callback is None else [callback]

    @property
    def ids(self) -> list[int]:
        """Ids of the answer so far."""
        return [token.id for token in self.tokens]

    @property
    def lead(self) -> int:
        """Tokens of the segments that the prompt begins with."""
        return sum(len(part.ref) for part in self.segments)

    def cancel(self) -> None:
        """Gives the request up, from any thread and in any state; what it held is free a step later."""
        self.cancelling = True

    def result(self, timeout: float | int | None = None) -> list[int]:
        """Waits for the end, and gives the ids of the answer; of one that was given up, what there is of it.

        Raises:
            RuntimeError: The request failed, or no step was ever taken that could serve it, and no time is given.
            TimeoutError: It did not end in time.
        """
        if timeout is None:
            self._check_served()
        with self._changed:
            if not self._changed.wait_for(lambda: self.state.ended, timeout):
                raise TimeoutError(f"request {self.number} has not ended after {timeout} s")
        if self.state is State.FAILED:
            raise RuntimeError(f"request {self.number} failed: {self.error}") from self.error
        return self.ids

    def __iter__(self) -> Iterator[Token]:
        """Tokens as they come."""
        self._check_served()
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self.tokens) > seen or self.state.ended)  # noqa: B023
                new, ended = self.tokens[seen:], self.state.ended
            yield from new
            seen += len(new)
            if ended and seen == len(self.tokens):
                self.result(0)
                return

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Tokens as they come, on the running event loop."""
        self._check_served()
        queue: asyncio.Queue[Token | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for token in self.listen(lambda _, token: _tell(loop, queue, token)):
            queue.put_nowait(token)
        if self.state.ended:
            queue.put_nowait(None)
        while (token := await queue.get()) is not None:
            yield token
        self.result(0)

    def __await__(self) -> Any:
        return self._ids().__await__()

    async def _ids(self) -> list[int]:
        return [token.id async for token in self]

    def listen(self, callback: Callable[[Request, Token | None], Any]) -> list[Token]:
        """Calls back with every token from now on, and `None` at the end; gives the tokens that there are."""
        with self._changed:
            if not self.state.ended:
                self._listeners.append(callback)
            return list(self.tokens)

    def _check_served(self) -> None:
        if not self.state.ended and not self.served():
            raise RuntimeError(
                f"request {self.number} would be waited for without end, since its engine was never started: call "
                "engine.start() before, write `with engine:`, or take the steps, engine.drain(); or since it is "
                "waited for within its own step, by a callback"
            )

    # What the engine calls

    def emit(self, token: Token) -> None:
        """Adds a token; what a callback raises goes to the engine, which ends this request by it."""
        with self._changed:
            self.last_token = time.monotonic()
            self.first_token = self.first_token or self.last_token
            self.tokens.append(token)
            listeners = list(self._listeners)
            self._changed.notify_all()
        for listener in listeners:
            listener(self, token)

    def end(self, state: State, reason: str, error: BaseException | None = None) -> None:
        """Ends it; a second end changes nothing."""
        with self._changed:
            if self.state.ended:
                return
            self.state, self.reason, self.error = state, reason, error
            listeners, self._listeners = self._listeners, []
            self._changed.notify_all()
        for listener in listeners:
            try:
                listener(self, None)
            except (Exception, SystemExit) as e:  # whoever listens has gone; the others are still told
                self.error = self.error or e

    def __repr__(self) -> str:
        return f"Request({self.number}, {len(self.prompt)} + {len(self.tokens)} tokens, {self.state.value})"


def _tell(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Token | None], token: Token | None) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, token)
