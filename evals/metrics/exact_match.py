"""Whether an answer is one of the right ones, word for word."""

from collections.abc import Sequence

from evals.metrics.judge import Judge
from evals.metrics.normal_text import normal


class ExactMatch(Judge):
    """1 if the answer is a right one after SQuAD's normalisation (case, punctuation, articles), else 0."""

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        return float(normal(prediction) in map(normal, references))
