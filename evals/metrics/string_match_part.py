"""Whether an answer holds a right one."""

from collections.abc import Sequence

from evals.metrics.judge import Judge


class StringMatchPart(Judge):
    """1 if the answer holds any reference, in any case, else 0 (RULER's `string_match_part`)."""

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        return float(any(reference.lower() in prediction.lower() for reference in references))
