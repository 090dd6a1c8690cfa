"""A task of given questions about passages, whose contexts are filled with the passages of other questions."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from evals.task import Example
from evals.tasks.documents import Inquiry, Passage, ask
from evals.tasks.length import fullest


@dataclass(frozen=True, slots=True)
class Inquiries:
    """Asks each question about the passages it needs, among others: first its own, then those of other questions.

    Attributes:
        name: As on the command line.
        metric: Name of a module in `evals/metrics`.
        read: Returns the questions.
    """

    name: str
    metric: str
    read: Callable[[], Sequence[Inquiry]]

    def examples(self, tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Example]:
        """See `Task.examples`. Questions whose own passages are too long are left out; a larger count only appends."""
        inquiries = self.read()
        order = np.random.default_rng((zlib.crc32(self.name.encode()), seed)).permutation(len(inquiries)).tolist()
        found = size = 0
        for place, chosen in enumerate(order):
            if found == count:
                return
            others = _others(inquiries[chosen], (inquiries[i] for i in (*order[place + 1 :], *order[:place])), length)

            def build(size: int, chosen: int = chosen, others: Sequence[Passage] = others) -> Example:
                rng = np.random.default_rng((zlib.crc32(self.name.encode()), seed, length, chosen))
                example = ask(rng, inquiries[chosen], others[:size])
                return replace(example, id=f"{self.name}-{length}-{seed}-{example.id}")

            try:
                example, size = fullest(build, tokenizer, length, 0, size, largest=len(others))
            except ValueError:
                continue
            found += 1
            yield example
        if found < count:
            raise ValueError(
                f"{self.name} has {found} questions (of {len(inquiries)}) that fit {length} tokens, count is {count}"
            )


def _others(inquiry: Inquiry, more: Iterator[Inquiry], length: int) -> list[Passage]:
    """Return different passages that the inquiry does not need: more than fill `length` tokens, if there are."""
    taken = {passage.title for passage in inquiry.needed}
    others: list[Passage] = []
    characters = 0
    for passage in chain(inquiry.others, (passage for each in more for passage in (*each.needed, *each.others))):
        if characters > 8 * length:  # no tokenizer of text makes fewer tokens
            break
        if passage.title not in taken:
            taken.add(passage.title)
            others.append(passage)
            characters += len(passage.text)
    return others
