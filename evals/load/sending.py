"""Requests on their way to a server that speaks OpenAI's protocol, and when each part of an answer came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .workload import Asked, Workload


@dataclass
class Answer:
    """What came of a request; times are seconds after it was due.

    Attributes:
        asked: The request.
        sent: When it left; later than 0 where the sender was behind, or held it back.
        parts: When each part of the text came, the first token first.
        ended: When nothing more was to come.
        tokens: Of the answer, as the server counts them; of one that does not, the parts.
        prompt, cached: Tokens of the prompt, and those that the server need not read, as it says.
        error: Why there is no answer; empty if there is.
    """

    asked: Asked
    sent: float = 0.0
    parts: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    prompt: int = 0
    cached: int = 0
    error: str = ""


@dataclass(frozen=True)
class Server:
    """Whom to ask.

    Attributes:
        url: With its `/v1`.
        model: By the server's name for it.
        key: What it asks for, if it does.
        timeout: Seconds that a request may take.
        most: Requests under way at once; `None` sends each when it is due.
        more: Fields that are sent with every request, beside OpenAI's.
        boundary: What of each segment is recomputed; the server's own by default.
    """

    url: str
    model: str
    key: str = "none"
    timeout: float = 600.0
    most: int | None = None
    more: dict[str, Any] = field(default_factory=dict)
    boundary: float | int | None = None

    def client(self) -> Any:
        """OpenAI's, which asks each once."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=self.timeout)


async def send(server: Server, load: Workload, told: Callable[[Answer], Any] = lambda answer: None) -> list[Answer]:
    """Stores the documents, sends all requests when they are due, and waits for the answers.

    A request is timed from when it was due, not from when it left: one that a slow server holds back, and those behind
    it, have waited all the same.

    Args:
        server: Whom to ask.
        load: What.
        told: Called with each answer when it has ended.

    Raises:
        ValueError: The server does not store documents, or says that it has no such model.
    """
    async with server.client() as client:
        stored = await _store(client, server, load)
        gate = asyncio.Semaphore(server.most or max(len(load.requests), 1))
        start = time.perf_counter()

        async def one(asked: Asked) -> Answer:
            answer, due = Answer(asked), start + asked.at
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            async with gate:
                answer.sent = time.perf_counter() - due
                try:
                    await _ask(client, server, answer, [stored[i] for i in asked.segments], due)
                except Exception as e:  # one request's
                    answer.error = f"{type(e).__name__}: {e}"
            answer.ended = time.perf_counter() - due
            told(answer)
            return answer

        return list(await asyncio.gather(*map(one, load.requests)))


async def models_of(server: Server) -> list[str]:
    """The names of what a server serves.

    Raises:
        ConnectionError: There is no such server, or it does not say.
    """
    from openai import OpenAIError

    try:
        async with server.client() as client:
            return [model.id async for model in client.models.list()]
    except OpenAIError as e:
        raise ConnectionError(f"{server.url}/models: {e} Is a server there, and does it want a --key?") from e


async def _store(client: Any, server: Server, load: Workload) -> list[str]:
    if not load.documents:
        return []
    from openai import OpenAIError

    body = {"input": [list(ids) for ids in load.documents], "model": server.model}
    try:
        found = await client.post("/segments", cast_to=dict[str, Any], body=body)
    except OpenAIError as e:
        raise ValueError(f"the server stores no segments ({e}): leave out --segment-share") from e
    return [one["id"] for one in found["data"]]


async def _ask(client: Any, server: Server, answer: Answer, segments: list[str], due: float) -> None:
    asked, more = answer.asked, dict(server.more)
    if segments:
        more["segments"] = segments
        if server.boundary is not None:
            more["boundary"] = server.boundary
    stream = await client.completions.create(
        model=server.model, prompt=list(asked.prompt), max_tokens=asked.new, stream=True,
        stream_options={"include_usage": True}, extra_body=more,
    )  # fmt: skip
    async for part in stream:
        if part.choices and (part.choices[0].text or part.choices[0].finish_reason is None):
            answer.parts.append(time.perf_counter() - due)
        if part.usage is not None:
            answer.tokens, answer.prompt = part.usage.completion_tokens, part.usage.prompt_tokens
            details = getattr(part.usage, "prompt_tokens_details", None)
            answer.cached = getattr(details, "cached_tokens", None) or 0
    answer.tokens = answer.tokens or len(answer.parts)
    if not answer.parts and not answer.tokens:
        raise RuntimeError("the server sent nothing")
