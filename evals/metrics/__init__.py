"""Judges of answers: modules in the format of `evaluate`, kept here so that they load without a network."""

from evals.metrics.exact_match import ExactMatch
from evals.metrics.judge import Judge

JUDGES: dict[str, type[Judge]] = {
    "exact_match": ExactMatch,
}


def load(name: str) -> Judge:
    """Return the judge of this name.

    Raises:
        ValueError: There is no such judge.
    """
    if name not in JUDGES:
        raise ValueError(f"no metric is called {name!r}: choose one of {', '.join(JUDGES)}")
    return JUDGES[name](keep_in_memory=True)
