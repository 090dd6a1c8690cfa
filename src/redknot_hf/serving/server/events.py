"""What routes send alike: server-sent events, usage, and log-probabilities."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from redknot_hf.serving.request import Token

from .answers import Answers

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
