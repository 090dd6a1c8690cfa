"""How many of the right answers an answer holds."""

from collections.abc import Sequence

from evals.metrics.judge import Judge


class StringMatchAll(Judge):
    """Share of the references that the answer holds, in any case (RULER's `string_match_all`)."""

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        return sum(reference.lower() in prediction.lower() for reference in references) / len(references)
