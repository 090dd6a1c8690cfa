"""How many of the numbers in an answer are that of the right paragraph."""

from collections.abc import Sequence

from evals.metrics.judge import Judge
from evals.metrics.numbers_in import integers


class Retrieval(Judge):
    """Share of the answer's whole numbers that are the one in the reference ("Paragraph 7", LongBench)."""

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        found = integers(prediction)
        return max(found.count(integers(reference)[0]) / max(1, len(found)) for reference in references)
