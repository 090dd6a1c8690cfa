"""`/v1/responses`: conversations in the newer shape of OpenAI's API; nothing of them is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .answers import Answers, Piece, Stream
from .bodies import ResponseBody
from .errors import RequestError
from .events import Likely, event
from .output import Output
from .service import Question, Service
from .turns import turns_of


def routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(request: Request, body: ResponseBody) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        flat = [tool.model_dump(exclude_none=True, exclude={"type"}) for tool in body.tools or ()]
        tools = None if body.tool_choice == "none" or not flat else [{"type": "function", "function": x} for x in flat]
        options = dict(body.chat_template_kwargs or {})
        if body.reasoning is not None and body.reasoning.effort is not None:
            options["reasoning_effort"] = body.reasoning.effort
        head, ids = await service.prompts.chat(turns_of(body), tools, options, bool(body.segments))
        context = await service.library.before(body, head)
        new = service.room(ids, body.max_output_tokens, None, context.tokens)
        number = request.state.request_id
        wanted = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ())
        answers = service.ask(
            number, [Question(ids, new, context)], 1, body, (body.top_logprobs or 0) if wanted else None,
            await service.prompts.parser(service.engine.model, ids, tools),
        )  # fmt: skip
        output = Output(number, Likely(service.prompts.tokenizer) if wanted else None)
        base = _base(body, number, service)
        if body.stream:
            return Stream(_events(answers, output, base), answers)
        (piece,) = await answers.whole(request)
        output.add(piece)
        return JSONResponse(_ended(base, output, piece, answers))

    return router


async def _events(answers: Answers, output: Output, base: dict[str, Any]) -> AsyncIterator[str]:
    for kind in ("created", "in_progress"):
        yield _told(output.event(f"response.{kind}", response=base))
    try:
        async for pieces in answers:
            for piece in pieces:
                yield "".join(map(_told, output.add(piece)))
                if piece.end:
                    ended = _ended(base, output, piece, answers)
                    yield _told(output.event(f"response.{ended['status']}", response=ended))
    except RequestError as e:
        error = {"code": "server_error", "message": e.detail}
        failed = {**base, "status": "failed", "error": error, "output": output.items}
        yield _told(output.event("response.failed", response=failed))


def _told(content: dict[str, Any]) -> str:
    return event(content, content["type"])


def _base(body: ResponseBody, number: str, service: Service) -> dict[str, Any]:
    """A response that has just begun."""
    return {
        "id": f"resp_{number}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": service.settings.name,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _ended(base: dict[str, Any], output: Output, piece: Piece, answers: Answers) -> dict[str, Any]:
    """A response that has ended, whole or at its limit."""
    prompt, new = answers.prompt_tokens, answers.new_tokens
    cut = piece.end == "length"
    return {
        **base,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output.items,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": answers.cached_tokens},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + new,
        },
    }
