"""RULER's variable tracking: a chain of assignments in noise, all of whose variables hold one value."""

from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase

import numpy as np

from evals.task import Example
from evals.tasks.prose import scatter
from evals.tasks.ruler.needles import NOISE
from evals.tasks.vocabulary import distinct, letters, number

INSTRUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


@dataclass(frozen=True, slots=True)
class Variables:
    """One chain of `hops` assignments after the first; a shorter text with another chain shows how to answer."""

    hops: int = 4

    def __call__(self, rng: np.random.Generator, index: int, size: int, length: int) -> Example:
        """See `Draw`: the size counts repetitions of the noise."""
        names = distinct(rng, lambda rng: letters(rng, 5, ascii_uppercase), 2 * (self.hops + 1))
        values = distinct(rng, lambda rng: number(rng, 5), 2)
        shown, asked = names[: self.hops + 1], names[self.hops + 1 :]
        example = f"{self._text(rng, 5, shown, values[0])}{self._question(values[0])}{self._prefix(values[0])}"
        return Example(
            id="",
            context=f"{example} {' '.join(shown)}\n\n{self._text(rng, size, asked, values[1])}",
            question=self._question(values[1]),
            answers=tuple(asked),
            max_new_tokens=30,
            answer_prefix=self._prefix(values[1]),
        )

    def _text(self, rng: np.random.Generator, size: int, names: list[str], value: str) -> str:
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(names)]
        return INSTRUCTION + "\n".join(scatter(rng, [NOISE] * size, chain)) + "\n"

    def _question(self, value: str) -> str:
        return f"Question: Find all variables that are assigned the value {value} in the text above."

    def _prefix(self, value: str) -> str:
        return (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{self.hops + 1} variables are assigned the value {value}, they are:"
        )
