"""Whether the first number of an answer is the right one."""

from collections.abc import Sequence

from evals.metrics.judge import Judge
from evals.metrics.numbers_in import decimals


class FirstNumber(Judge):
    """1 if the answer's first number equals a reference, else 0 (InfiniteBench's pass key, number string, math find).

    References may have a sign, which is not compared, as there.
    """

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        found = decimals(prediction)
        return float(bool(found) and found[0] in [abs(float(reference)) for reference in references])
