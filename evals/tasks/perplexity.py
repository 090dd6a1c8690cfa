"""Perplexity of a text: stretches of it, each to be read, and how likely the words are that go on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.task import Example
from evals.tasks.length import prompt_tokens, tokens

NAMES = ("perplexity",)
QUESTION_TOKENS = 8  # the end of a stretch, which is read after the context, as a question is


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Stretches of a text file; the score of each is one over the perplexity of the words after it.

    Attributes:
        name: As on the command line.
        source: The text file, UTF-8.
        metric: No judge of answers: the measure is the log-likelihood of the answer that is given.
        scored: Tokens that are scored, at most.
    """

    name: str
    source: str
    metric: str = "likelihood"
    scored: int = 256

    def examples(self, tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Example]:
        """See `Task.examples`. Stretches begin at random places and may overlap; a larger count only appends."""
        if length <= 2 * QUESTION_TOKENS:
            raise ValueError(f"{self.name} needs more than {2 * QUESTION_TOKENS} tokens, length is {length}")
        text = Path(self.source).read_text(encoding="utf-8")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in encoded["offset_mapping"]]
        scored = min(self.scored, length // 2)
        if len(starts) < length + scored:
            raise ValueError(
                f"{self.source} has {len(starts)} tokens, a stretch of {length} with {scored} to score needs more"
            )
        rng = np.random.default_rng(seed)
        for index in range(count):
            first = int(rng.integers(len(starts) - length - scored + 1))
            yield self._example(tokenizer, text, starts, first, length, f"{self.name}-{length}-{seed}-{index}")

    def _example(self, tokenizer: Any, text: str, starts: list[int], first: int, length: int, name: str) -> Example:
        """Return the stretch from one token on; a text cut elsewhere may have a token more, which it must lose."""
        scored, kept = min(self.scored, length // 2), length
        split = starts[first + length]
        end = starts[first + length + scored] if first + length + scored < len(starts) else len(text)
        answer, asked = text[split:end], starts[first + length - QUESTION_TOKENS]
        while True:
            example = Example(
                id=name,
                context=text[starts[first + length - kept] : asked],
                question=text[asked:split],
                answers=(answer,),
                max_new_tokens=tokens(tokenizer, answer),
                given=True,
            )
            if (excess := prompt_tokens(tokenizer, example) - length) <= 0:
                return example
            kept -= excess


def load(name: str, source: str | None) -> Perplexity:
    """Return the task; the source is the text file.

    Raises:
        ValueError: There is no source.
    """
    if source is None:
        raise ValueError(f"{name} is measured on a text: give a text file as the source")
    return Perplexity(name, source)
