"""RULER's needles: numbers or UUIDs that belong to words, hidden in noise, in prose or among each other."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from evals.task import Example
from evals.tasks.prose import Prose, scatter
from evals.tasks.vocabulary import distinct, number, uuid4, word_pair

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
MAKERS: dict[str, Callable[[np.random.Generator], str]] = {"word": word_pair, "number": number, "uuid": uuid4}


@dataclass(frozen=True, slots=True)
class Needles:
    """How many needles are hidden, of what, in what; `keys` of them, of which `queries` are asked for.

    Attributes:
        hay: Where they are hidden.
        key: What needles are known by, of `MAKERS`.
        value: What they hold, of `MAKERS`.
        keys: Needles with different keys.
        values: Needles with the same key.
        queries: Keys asked for at once.
        prose: Where prose comes from.
    """

    hay: Literal["noise", "prose", "needles"] = "prose"
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    prose: Prose = field(default_factory=Prose)

    def __call__(self, rng: np.random.Generator, index: int, size: int, length: int) -> Example:
        """See `Draw`: the size counts sentences."""
        hay_keys = size if self.hay == "needles" else 0
        keys = distinct(rng, MAKERS[self.key], self.keys + hay_keys)
        values = distinct(rng, MAKERS[self.value], self.keys * self.values + hay_keys)
        held = np.reshape(values[: self.keys * self.values], (self.keys, self.values)).tolist()
        needles = [self._needle(key, value) for key, own in zip(keys, held, strict=False) for value in own]
        hay_needles = zip(keys[self.keys :], values[self.keys * self.values :], strict=True)
        text = scatter(
            rng, self._hay(rng, size, hay_needles), [needles[i] for i in rng.permutation(len(needles)).tolist()]
        )
        asked = rng.permutation(self.keys)[: self.queries].tolist()
        answers = tuple(value for key in asked for value in held[key])
        return self._example(text, [keys[key] for key in asked], answers)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)

    def _hay(self, rng: np.random.Generator, size: int, needles: Iterable[tuple[str, str]]) -> list[str]:
        match self.hay:
            case "noise":
                return [NOISE] * size
            case "needles":
                return [self._needle(key, value) for key, value in needles]
            case "prose":
                return self.prose.sentences(rng, size)

    def _example(self, text: list[str], asked: list[str], answers: tuple[str, ...]) -> Example:
        kind = self.value
        keys = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        if len(answers) == 1:
            opening, what, of = f"A special magic {kind} is hidden", f"What is the special magic {kind}", "is"
            quiz, stem = f"the {kind}", f"The special magic {kind}"
        else:
            opening, what, of = (
                f"Some special magic {kind}s are hidden",
                f"What are all the special magic {kind}s",
                "are",
            )
            quiz, stem = f"the {kind}s", f"The special magic {kind}s"
        it = "it" if len(answers) == 1 else "them"
        joined = (" " if self.hay == "prose" else "\n").join(text)
        return Example(
            id="",
            context=f"{opening} within the following text. Make sure to memorize {it}. "
            f"I will quiz you about {quiz} afterwards.\n{joined}\n",
            question=f"{what} for {keys} mentioned in the provided text?",
            answers=answers,
            max_new_tokens=128,
            answer_prefix=f" {stem} for {keys} mentioned in the provided text {of}",
        )
