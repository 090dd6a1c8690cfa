"""How many words an answer shares with a right one."""

from collections import Counter
from collections.abc import Sequence

from evals.metrics.judge import Judge
from evals.metrics.normal_text import normal


class SquadF1(Judge):
    """F1 of the words after SQuAD's normalisation (Rajpurkar et al. 2016), of the reference that gives most."""

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        words = normal(prediction).split()
        return max(overlap_f1(words, normal(reference).split()) for reference in references)


def overlap_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Return the F1 of two bags of words or characters; two empty ones are equal."""
    if not predicted or not expected:
        return float(not predicted and not expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))
