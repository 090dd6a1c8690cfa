"""A task whose examples are made, not read: drawn from a seed and filled up to any length of any tokenizer."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from evals.task import Example
from evals.tasks.length import fullest


class Draw(Protocol):
    """What makes an example; its id is given later."""

    def __call__(self, rng: np.random.Generator, index: int, size: int, length: int) -> Example:
        """Return the example that the generator decides.

        Args:
            rng: In the same state for all sizes of one example.
            index: The example's place in the task.
            size: Units of filler: sentences, words, pairs, documents.
            length: Tokens that were asked for, for what depends on them beside the size.
        """
        ...


@dataclass(frozen=True, slots=True)
class Generated:
    """A task that draws its examples one by one, each with a context of its own.

    Attributes:
        name: As on the command line.
        metric: Name of a module in `evals/metrics`.
        draw: Makes an example of a size.
        smallest: The smallest size that holds a question.
    """

    name: str
    metric: str
    draw: Draw
    smallest: int

    def examples(self, tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Example]:
        """See `Task.examples`. A larger count only appends."""
        size = self.smallest
        for index in range(count):
            example, size = fullest(
                lambda size, index=index: self._example(index, size, length, seed),
                tokenizer,
                length,
                self.smallest,
                guess=size,
            )
            yield example

    def _example(self, index: int, size: int, length: int, seed: int) -> Example:
        rng = np.random.default_rng((zlib.crc32(self.name.encode()), seed, length, index))
        return replace(self.draw(rng, index, size, length), id=f"{self.name}-{length}-{seed}-{index}")
