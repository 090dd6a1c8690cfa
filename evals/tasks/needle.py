"""A needle in a haystack (Kamradt 2023): one number in prose, at eleven depths in turn."""

from dataclasses import dataclass

import numpy as np

from evals.task import Example
from evals.tasks.generated import Generated
from evals.tasks.prose import Prose
from evals.tasks.vocabulary import number, word_pair

NAMES = ("needle",)
DEPTHS = 11


@dataclass(frozen=True, slots=True)
class Needle:
    """One needle in prose; over the lengths of several runs this makes the grid of depth and length."""

    prose: Prose

    def __call__(self, rng: np.random.Generator, index: int, size: int, length: int) -> Example:
        """See `Draw`: the size counts sentences."""
        depth = index % DEPTHS / (DEPTHS - 1)
        key, value = word_pair(rng), number(rng)
        text = self.prose.sentences(rng, size)
        text.insert(round(depth * size), f"The secret number of the {key} is {value}.")
        return Example(
            id="",
            context=f"Read the following text and remember the secret number in it.\n\n{' '.join(text)}\n\n",
            question=f"What is the secret number of the {key}?\n",
            answers=(value,),
            max_new_tokens=16,
            answer_prefix=f"The secret number of the {key} is",
            kind=f"depth {depth:.0%}",
        )


def load(name: str, source: str | None) -> Generated:
    """Return the task; a source is a text file to take the prose from."""
    return Generated(name, "string_match_part", Needle(Prose(source)), smallest=1)
