"""Whether an answer names the right label, and no other of those that may be meant."""

from collections.abc import Sequence

from evals.metrics.judge import Judge


class OnlyLabel(Judge):
    """1 if the answer's first sentence names what the reference names, and no other choice, else 0 (BABILong).

    A reference may name several labels with commas between them.
    """

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        if not choices:
            raise ValueError("only_label needs all labels that may be meant: pass them as choices")
        sentence = prediction.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
        named = {label.lower() for label in choices if label.lower() in sentence}
        return float(any(named == set(reference.lower().split(",")) for reference in references))
