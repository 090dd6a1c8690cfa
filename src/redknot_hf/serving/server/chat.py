"""`/v1/chat/completions`: conversations, by the model's chat template, with tools and thoughts told apart."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from transformers.cli.serving.utils import ReasoningText, ToolCall

from .answers import Answers, Piece, Stream
from .bodies import ChatBody
from .errors import RequestError
from .events import Likely, chunks, event, usage
from .service import Question, Service


def routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None
        tools = None if body.tool_choice == "none" else tools
        options = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            options["reasoning_effort"] = body.reasoning_effort
        head, ids = await service.prompts.chat(body.messages, tools, options, bool(body.segments))
        context = await service.library.before(body, head)
        new = service.room(ids, body.max_completion_tokens or body.max_tokens, None, context.tokens)
        number = request.state.request_id
        answers = service.ask(
            number, [Question(ids, new, context)], body.n or 1, body, _most(body),
            await service.prompts.parser(service.engine.model, ids, tools),
        )  # fmt: skip
        base = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": service.settings.name}
        likely = Likely(service.prompts.tokenizer) if body.logprobs else None
        if body.stream:
            wanted = bool(body.stream_options and body.stream_options.include_usage)
            return Stream(_events(answers, base | {"object": "chat.completion.chunk"}, likely, wanted), answers)
        choices = [_choice(piece, number, likely) for piece in await answers.whole(request)]
        base["object"] = "chat.completion"
        return JSONResponse({**base, "choices": choices, "usage": usage(answers)})

    return router


def _most(body: ChatBody) -> int | None:
    """Log-probabilities of how many tokens beside the chosen one."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


async def _events(answers: Answers, base: dict[str, Any], likely: Likely | None, wanted: bool) -> AsyncIterator[str]:
    calls: dict[int, int] = {}
    number = base["id"].removeprefix("chatcmpl-")
    for index in range(len(answers.requests)):
        delta = {"role": "assistant", "content": ""}
        yield event({**base, "choices": [{"index": index, "delta": delta, "finish_reason": None}]})
    async for text in chunks(answers, base, lambda piece: _deltas(piece, number, likely, calls), wanted):
        yield text


def _deltas(piece: Piece, number: str, likely: Likely | None, calls: dict[int, int]) -> list[dict[str, Any]]:
    """A delta for each part; log-probabilities go with the first."""
    deltas: list[dict[str, Any]] = []
    for part in piece.parts:
        if isinstance(part, ToolCall):
            at = calls[piece.index] = calls.get(piece.index, -1) + 1
            deltas.append({"tool_calls": [{"index": at, **_call(part, f"{number}-{piece.index}-{at}")}]})
        else:
            deltas.append({"reasoning_content" if isinstance(part, ReasoningText) else "content": part})
    if piece.end or not deltas:
        deltas.append({})
    made: list[dict[str, Any]] = [{"index": piece.index, "delta": delta, "finish_reason": None} for delta in deltas]
    if likely is not None and piece.tokens:
        made[0]["logprobs"] = {"content": [likely(token) for token in piece.tokens]}
    made[-1]["finish_reason"] = piece.end
    return made


def _choice(piece: Piece, number: str, likely: Likely | None) -> dict[str, Any]:
    calls = [part for part in piece.parts if isinstance(part, ToolCall)]
    thoughts = "".join(part for part in piece.parts if isinstance(part, ReasoningText))
    text = "".join(part for part in piece.parts if type(part) is str)
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = [_call(x, f"{number}-{piece.index}-{i}") for i, x in enumerate(calls)]
    logprobs = None if likely is None else {"content": [likely(token) for token in piece.tokens], "refusal": None}
    return {"index": piece.index, "message": message, "logprobs": logprobs, "finish_reason": piece.end}


def _call(call: ToolCall, number: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call-{number}", "type": "function", "function": function}
