"""Judges of answers: modules in the format of `evaluate`, kept here so that they load without a network."""

from evals.metrics.character_f1 import CharacterF1
from evals.metrics.choice import Choice
from evals.metrics.classification import Classification
from evals.metrics.code_similarity import CodeSimilarity
from evals.metrics.count import Count
from evals.metrics.exact_match import ExactMatch
from evals.metrics.first_number import FirstNumber
from evals.metrics.judge import Judge
from evals.metrics.last_number import LastNumber
from evals.metrics.leading_numbers import LeadingNumbers
from evals.metrics.only_label import OnlyLabel
from evals.metrics.retrieval import Retrieval
from evals.metrics.rouge_l import RougeL
from evals.metrics.squad_f1 import SquadF1
from evals.metrics.string_match_all import StringMatchAll
from evals.metrics.string_match_part import StringMatchPart

JUDGES: dict[str, type[Judge]] = {
    "exact_match": ExactMatch,
    "squad_f1": SquadF1,
    "character_f1": CharacterF1,
    "rouge_l": RougeL,
    "string_match_all": StringMatchAll,
    "string_match_part": StringMatchPart,
    "choice": Choice,
    "classification": Classification,
    "only_label": OnlyLabel,
    "retrieval": Retrieval,
    "count": Count,
    "first_number": FirstNumber,
    "last_number": LastNumber,
    "leading_numbers": LeadingNumbers,
    "code_similarity": CodeSimilarity,
}


def load(name: str) -> Judge:
    """Return the judge of this name.

    Raises:
        ValueError: There is no such judge.
    """
    if name not in JUDGES:
        raise ValueError(f"no metric is called {name!r}: choose one of {', '.join(JUDGES)}")
    return JUDGES[name](keep_in_memory=True)
