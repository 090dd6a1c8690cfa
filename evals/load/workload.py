"""What is asked of a server, and when: drawn from distributions, or from a file, and always the same for a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Draw = Callable[[random.Random], int]
# Ids from here on; the first ones have meanings of their own in most vocabularies.
_FIRST = 3


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        at: Seconds after the first.
        prompt: Token ids, those of a shared prefix included.
        new: Tokens of the answer.
        segments: Which documents stand before the prompt, by their place in `Workload.documents`.
        shared: Tokens of the prompt that other requests begin with too.
    """

    at: float
    prompt: tuple[int, ...]
    new: int
    segments: tuple[int, ...] = ()
    shared: int = 0


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival, and the documents that they name.

    Attributes:
        requests: What is asked.
        documents: Token ids of what is stored before the first request.
    """

    requests: tuple[Asked, ...]
    documents: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Shared:
    """What some requests begin with.

    Attributes:
        share: Of the requests that do.
        count: How many such beginnings, or documents, there are.
        tokens: Of each.
        each: How many of them a request takes.
    """

    share: float = 0.0
    count: int = 4
    tokens: int = 1024
    each: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"a share is {self.share}: give 0 to 1")
        if self.share and not (self.count >= self.each >= 1 and self.tokens >= 1):
            raise ValueError(
                f"{self.each} of {self.count} beginnings of {self.tokens} tokens: give 1 at least of each"
            )


def length(told: str) -> Draw:
    """Draws lengths: `512` is always that, `128-2048` any between, `~512` exponential with this mean.

    Raises:
        ValueError: It says nothing of the kind.
    """
    try:
        if told.startswith("~"):
            mean = int(told[1:])
            _check(mean >= 1)
            return lambda draw: max(1, round(draw.expovariate(1 / mean)))
        least, _, most = told.partition("-")
        low, high = int(least), int(most or least)
        _check(1 <= low <= high)
    except ValueError as e:
        raise ValueError(f"length {told!r}: give 512, 128-2048, or ~512 for exponential lengths of that mean") from e
    return lambda draw: draw.randint(low, high)


def lengths_of(file: Path) -> list[tuple[int, int]]:
    """Lengths of prompts and answers, in their order: JSON lines with `prompt` and `new`.

    Raises:
        ValueError: A line is something else, or there is none.
    """
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            found.append((int(row["prompt"]), int(row["new"])))
            _check(min(found[-1]) >= 1)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f'{file}, line {number}: {line!r:.60} is not {{"prompt": 512, "new": 64}}') from e
    if not found:
        raise ValueError(f"{file} has no lines: give lengths, one a line")
    return found


def draw_workload(
    lengths: list[tuple[int, int]],
    rate: float | None,
    words: int,
    seed: int = 0,
    *,
    prefixes: Shared = Shared(),
    segments: Shared = Shared(),
) -> Workload:
    """Draws requests of these lengths.

    Args:
        lengths: Tokens of each prompt, behind what it shares with others, and of each answer.
        rate: Requests a second, which arrive as a Poisson process; `None` lets all arrive at once.
        words: Of the vocabulary that ids are drawn from.
        seed: Of all draws.
        prefixes: What some prompts begin with.
        segments: What documents some requests name; they stand before the prompt.
    """
    draw = random.Random(seed)
    text = lambda tokens: tuple(draw.randrange(_FIRST, words) for _ in range(tokens))  # noqa: E731
    heads = [text(prefixes.tokens) for _ in range(prefixes.count if prefixes.share else 0)]
    documents = tuple(text(segments.tokens) for _ in range(segments.count if segments.share else 0))
    made, at = [], 0.0
    for tokens, new in lengths:
        head = draw.choice(heads) if heads and draw.random() < prefixes.share else ()
        named = draw.sample(range(len(documents)), segments.each) if draw.random() < segments.share else ()
        made.append(Asked(at, head + text(tokens), new, tuple(named), len(head)))
        at += draw.expovariate(rate) if rate else 0.0
    return Workload(tuple(made), documents)


def _check(fine: bool) -> None:
    if not fine:
        raise ValueError
