"""RULER's 13 tasks (Hsieh et al. 2024), made anew for any tokenizer and length, its words in our own prose.

Questions and proportions are RULER's; the essays, word lists and passages are not, so scores are near to published
ones but do not compare with them. `ruler_hub` reads RULER's own prompts.
"""

from dataclasses import replace
from functools import partial

from evals.task import Task
from evals.tasks.generated import Draw, Generated
from evals.tasks.inquiries import Inquiries
from evals.tasks.prose import Prose
from evals.tasks.ruler.needles import Needles
from evals.tasks.ruler.questions import World, read_inquiries
from evals.tasks.ruler.variables import Variables
from evals.tasks.ruler.words import common_words, frequent_words

NEEDLES: dict[str, Needles] = {
    "niah_single_1": Needles(hay="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value="uuid"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(hay="needles"),
    "niah_multikey_3": Needles(hay="needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
}
QUESTIONS = {"qa_1": 1, "qa_2": 2}
# Besides needles and questions: what draws an example, and its smallest size.
OTHERS: dict[str, tuple[Draw, int]] = {
    "vt": (Variables(), 1),
    "cwe": (common_words, 20),
    "fwe": (frequent_words, 120),
}
METRICS = dict.fromkeys((*NEEDLES, *OTHERS), "string_match_all") | dict.fromkeys(QUESTIONS, "string_match_part")
NAMES = tuple(f"ruler/{task}" for task in METRICS)


def load(name: str, source: str | None) -> Task:
    """Return the task of this name.

    A source is, for needles in prose, a text file to take the prose from, and for questions a file of JSON lines with
    passages (`evals.tasks.ruler.questions.read_inquiries`).
    """
    task = name.removeprefix("ruler/")
    metric = METRICS[task]
    if source is None:
        draw, smallest = _draw(task)
        return Generated(name, metric, draw, smallest)
    if task in QUESTIONS:
        return Inquiries(name, metric, partial(read_inquiries, source))
    if task in NEEDLES and NEEDLES[task].hay == "prose":
        return Generated(name, metric, replace(NEEDLES[task], prose=Prose(source)), 1)
    raise ValueError(f"{name} makes its own texts and takes no source, not {source!r}")


def _draw(task: str) -> tuple[Draw, int]:
    if task in NEEDLES:
        return NEEDLES[task], 1
    return (World(QUESTIONS[task]), 2) if task in QUESTIONS else OTHERS[task]
