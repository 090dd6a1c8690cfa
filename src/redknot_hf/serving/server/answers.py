"""The answers to one HTTP request: asked of the engine, put into words as they come, given up when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers.cli.serving.utils import ToolCall

from redknot_hf.serving.inbox import QueueFullError
from redknot_hf.serving.request import Request, Sampling, State, Token

from .errors import RequestError, failed
from .post import Post
from .served import Served
from .wording import Wording


@dataclass
class Piece:
    """What has come of one answer since the last piece.

    Attributes:
        index: Which answer.
        parts: Text, thoughts and calls, as `Wording` tells them apart.
        tokens: What they were made of.
        end: Why it has ended, in OpenAI's words; `None` if it has not.
    """

    index: int
    parts: list[Any] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    end: str | None = None


class Answers:
    """`n` answers to each of some prompts, in their order.

    Iterating over it gives lists of pieces as they come; once only, and on the post's event loop.

    Args:
        engine: Serves them.
        post: Brings tokens here.
        number: Of the HTTP request, for the log.
    """

    def __init__(self, engine: Served, post: Post, number: str) -> None:
        self.engine, self.number, self._post = engine, number, post
        self.requests: list[Request] = []
        self._firsts: list[Request] = []
        self._words: dict[int, Wording] = {}
        self._pieces: dict[int, Piece] = {}
        self._called: set[int] = set()
        self._queue: asyncio.Queue[tuple[Request, Token | None]] = asyncio.Queue()

    def ask(self, ids: Sequence[int], sampling: Sampling, words: Sequence[Wording], **more: Any) -> None:
        """Asks for answers to a prompt.

        Args:
            ids: The prompt.
            sampling: How they are chosen.
            words: What puts each into words, of as many answers as are asked for.
            more: As `Engine.submit_many` has it.

        Raises:
            RequestError: The engine refuses it; what was asked before is given up.
        """
        try:
            made = self.engine.submit_many(ids, len(words), sampling, callback=self._tell, **more)
        except ValueError as e:
            self.cancel()
            raise RequestError(400, str(e), "invalid_value") from e
        except QueueFullError as e:
            self.cancel()
            raise RequestError(429, "too many requests wait: try again later", "queue_full", retry_after=1) from e
        except RuntimeError as e:
            self.cancel()
            raise RequestError(503, "the server is being shut down", "shutting_down", retry_after=5) from e
        self._firsts.append(made[0])
        for request, word in zip(made, words, strict=True):
            self._words[request.number] = word
            self._pieces[request.number] = Piece(len(self.requests))
            self.requests.append(request)

    def cancel(self) -> None:
        """Gives up what has not ended; seats are free a step later."""
        for request in self.requests:
            request.cancel()

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """Pieces as they come.

        Raises:
            RequestError: One has failed, or was given up.
        """
        left = len(self.requests)
        while left:
            came = [await self._queue.get()]
            while not self._queue.empty():
                came.append(self._queue.get_nowait())
            try:
                for request, token in came:
                    self._take(request, token)
            except RequestError:
                raise
            except Exception as e:  # what was written cannot be put into words
                raise failed(self.number, e) from e
            pieces = [x for x in self._pieces.values() if x.parts or x.end]
            for number, piece in list(self._pieces.items()):
                if piece.end:
                    del self._pieces[number]
                    left -= 1
                elif piece.parts:
                    self._pieces[number] = Piece(piece.index)
            if pieces:
                yield pieces

    async def whole(self, request: HttpRequest) -> list[Piece]:
        """Each answer in one piece; given up if the client goes away before.

        Raises:
            RequestError: One has failed, or was given up.
        """
        work = asyncio.ensure_future(self._all())
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise RequestError(499, "the client has gone")
            return work.result()
        finally:
            gone.cancel()
            work.cancel()
            self.cancel()

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(request.prompt) for request in self._firsts)

    @property
    def cached_tokens(self) -> int:
        """Of those, the ones that need not be read."""
        return sum(request.cached for request in self._firsts)

    @property
    def new_tokens(self) -> int:
        """Of all answers so far."""
        return sum(len(request.tokens) for request in self.requests)

    async def _all(self) -> list[Piece]:
        answers = [Piece(i) for i in range(len(self.requests))]
        async for pieces in self:
            for piece in pieces:
                answers[piece.index].parts += piece.parts
                answers[piece.index].tokens += piece.tokens
                answers[piece.index].end = piece.end
        return answers

    def _tell(self, request: Request, token: Token | None) -> None:
        """By the engine's thread."""
        self._post.put(self._queue, (request, token))

    def _take(self, request: Request, token: Token | None) -> None:
        piece, words = self._pieces[request.number], self._words[request.number]
        if token is not None:
            piece.tokens.append(token)
            parts = words.add(token.id)
        else:
            self._check(request)
            parts = words.rest()
        piece.parts += parts
        if any(isinstance(part, ToolCall) for part in parts):
            self._called.add(request.number)
        if token is None:
            piece.end = "tool_calls" if request.number in self._called else str(request.reason)

    def _check(self, request: Request) -> None:
        if request.state is State.DONE:
            return
        if request.state is State.FAILED:
            raise failed(self.number, request.error)
        if request.reason == "deadline":
            raise RequestError(504, "the answer took longer than this server waits: ask for less", "timeout")
        raise RequestError(503, "the server is being shut down", "shutting_down", retry_after=5)


class Stream(StreamingResponse):
    """Server-sent events of answers, which are given up however the response ends.

    Args:
        events: Their text.
        answers: To give up.
    """

    def __init__(self, events: AsyncIterator[str], answers: Answers) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.cancel()


async def _gone(request: HttpRequest) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
