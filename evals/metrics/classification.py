"""Whether an answer names the right class, and no other."""

from collections.abc import Sequence

from evals.metrics.judge import Judge


class Classification(Judge):
    """1 / n if the answer's first line names n of all classes, the reference among them, else 0 (LongBench).

    Names that are part of the reference's do not count.
    """

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        if not choices:
            raise ValueError("classification needs all classes: pass them as choices")
        line = prediction.lstrip().split("\n")[0]
        return max(_share([name for name in choices if name in line], reference) for reference in references)


def _share(named: list[str], reference: str) -> float:
    named = [name for name in named if name == reference or name not in reference]
    return 1 / len(named) if reference in named else 0.0
