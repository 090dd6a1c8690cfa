"""How many characters an answer shares with a right one, for writing that does not part its words."""

import unicodedata
from collections.abc import Sequence

from evals.metrics.judge import Judge
from evals.metrics.squad_f1 import overlap_f1


class CharacterF1(Judge):
    """F1 of the characters without space and punctuation, as InfiniteBench judges Chinese answers."""

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        return max(overlap_f1(_characters(prediction), _characters(reference)) for reference in references)


def _characters(text: str) -> list[str]:
    return [c for c in text.lower() if not c.isspace() and unicodedata.category(c)[0] not in "PS"]
