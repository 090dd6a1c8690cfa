"""How alike a line of code is to the right one."""

from collections.abc import Sequence
from difflib import SequenceMatcher

from evals.metrics.judge import Judge


class CodeSimilarity(Judge):
    """Likeness of characters between the answer's first line that is no comment or fence, and the reference.

    As LongBench has it, which rounds to whole percents.
    """

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        lines = prediction.lstrip("\n").split("\n")
        line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
        return max(round(100 * SequenceMatcher(None, line, reference).ratio()) / 100 for reference in references)
