"""Whether an answer ends with the right number."""

import re
from collections.abc import Sequence

from evals.metrics.judge import Judge

_NO_WORD = re.compile(r"[\n.`'\":]")


class LastNumber(Judge):
    """1 if the answer's last word is a whole number that equals a reference, else 0 (InfiniteBench's code run)."""

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        words = _NO_WORD.sub(" ", prediction).split()
        if not words or not re.fullmatch(r"[+-]?\d+", words[-1]):
            return 0.0
        return float(int(words[-1]) in [int(reference) for reference in references])
