"""Whether the letter that an answer chooses is the right one."""

import re
from collections.abc import Sequence

from evals.metrics.judge import Judge

# In this order: "The correct answer is (B)", "B" or "(B) because ...", and whatever letter stands last and alone.
_STATED = re.compile(r"(?i:answer|option|choice) is:?\s*\(?([A-D])\b")
_FIRST = re.compile(r"\(?([A-D])\b(?!')")
_ALONE = re.compile(r"\b([A-D])\b(?!')")


class Choice(Judge):
    """1 if the letter chosen, of A to D, is a reference, else 0.

    The letter is the one stated ("the answer is B"), else the one the answer begins with, else the last alone.
    """

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        text = prediction.replace("*", "").strip()
        found = _STATED.findall(text)[-1:] or _FIRST.match(text) or _ALONE.findall(text)[-1:]
        letter = found[0] if isinstance(found, list) and found else found[1] if isinstance(found, re.Match) else None
        return float(letter is not None and letter in references)
