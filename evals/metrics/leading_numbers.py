"""How far an answer's numbers are the right ones, from the first on."""

from collections.abc import Sequence

from evals.metrics.judge import Judge
from evals.metrics.numbers_in import integers


class LeadingNumbers(Judge):
    """Share of the references, in order, before the first that the answer misses (InfiniteBench's math calc)."""

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        right = 0
        for found, reference in zip(integers(prediction), references, strict=False):
            if int(found) != abs(int(reference)):
                break
            right += 1
        return right / len(references)
