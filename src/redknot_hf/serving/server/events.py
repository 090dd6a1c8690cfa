"""What routes send alike: server-sent events, usage, and log-probabilities."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from functools import lru_cache
from typing import Any

from redknot_hf.serving.request import Token

from .answers import Answers, Piece
from .errors import RequestError

DONE = "data: [DONE]\n\n"


def event(content: Any, name: str | None = None) -> str:
    """An event, of a name where the route has such."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n"


def usage(answers: Answers) -> dict[str, Any]:
    """Tokens that were read and written, and those that need not be read."""
    prompt, new = answers.prompt_tokens, answers.new_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": answers.cached_tokens},
    }


async def chunks(
    answers: Answers, base: dict[str, Any], choices: Callable[[Piece], Iterable[dict[str, Any]]], wanted: bool
) -> AsyncIterator[str]:
    """The events of a stream of completions, to its end or the error that ended it.

    Args:
        answers: That come.
        base: What every event says.
        choices: What they say of a piece of an answer, each in an event of its own.
        wanted: Whether the last says the usage.
    """
    try:
        async for pieces in answers:
            yield "".join(event({**base, "choices": [choice]}) for piece in pieces for choice in choices(piece))
    except RequestError as e:
        yield event(e.content)
        return
    if wanted:
        yield event({**base, "choices": [], "usage": usage(answers)})
    yield DONE


class Likely:
    """Log-probabilities as chat and responses have them.

    Args:
        tokenizer: Says how tokens are written.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.word = lru_cache(1024)(lambda i: tokenizer.decode([i]))

    def __call__(self, token: Token) -> dict[str, Any]:
        """Of a token, and of the likeliest in its place."""
        return {**self._one(token.id, token.logprob), "top_logprobs": [self._one(*likely) for likely in token.top]}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        word = self.word(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}
