"""How many of the numbers in an answer are the right one."""

from collections.abc import Sequence

from evals.metrics.judge import Judge
from evals.metrics.numbers_in import integers


class Count(Judge):
    """Share of the answer's whole numbers that are the reference (LongBench's passage count)."""

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        found = integers(prediction)
        return max(found.count(reference) / max(1, len(found)) for reference in references)
