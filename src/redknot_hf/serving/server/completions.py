"""`/v1/completions`: texts or ids that a model goes on with."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from redknot_hf.serving.request import Token

from .answers import Piece, Stream
from .bodies import CompletionBody, listed
from .events import Likely, chunks, usage
from .service import Question, Service

# What OpenAI's API says where a client says nothing.
_USUAL = 16


def routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Go on with a text."""
        service.check_model(body.model)
        context = await service.library.before(body)
        questions = []
        for text in listed(body.prompt, "prompt"):
            ids = text if isinstance(text, list) else await service.prompts.read(text, first=not context.refs)
            questions.append(Question(ids, service.room(ids, body.max_tokens, _USUAL, context.tokens), context))
        number = request.state.request_id
        answers = service.ask(number, questions, body.n or 1, body, body.logprobs)
        base = {"id": f"cmpl-{number}", "object": "text_completion", "created": int(time.time())}
        base["model"] = service.settings.name
        likely = _Logprobs(service.prompts.tokenizer, body.logprobs)
        if body.stream:
            wanted = bool(body.stream_options and body.stream_options.include_usage)
            return Stream(chunks(answers, base, lambda piece: [_choice(piece, likely)], wanted), answers)
        choices = [_choice(piece, likely) for piece in await answers.whole(request)]
        return JSONResponse({**base, "choices": choices, "usage": usage(answers)})

    return router


def _choice(piece: Piece, likely: _Logprobs) -> dict[str, Any]:
    text = "".join(piece.parts)
    return {"index": piece.index, "text": text, "logprobs": likely(piece), "finish_reason": piece.end}


class _Logprobs:
    """The older shape of log-probabilities: four lists."""

    def __init__(self, tokenizer: Any, most: int | None) -> None:
        self.most, self._likely = most, Likely(tokenizer)
        self._at: dict[int, int] = {}

    def __call__(self, piece: Piece) -> dict[str, Any] | None:
        if self.most is None:
            return None
        words = [self._likely.word(token.id) for token in piece.tokens]
        at = self._at.get(piece.index, 0)
        offsets = []
        for word in words:
            offsets.append(at)
            at += len(word)
        self._at[piece.index] = at
        return {
            "tokens": words,
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [self._top(token) for token in piece.tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float | None]:
        """The likeliest, and the chosen one where it is none of them."""
        return {self._likely.word(token.id): token.logprob, **{self._likely.word(i): x for i, x in token.top}}
