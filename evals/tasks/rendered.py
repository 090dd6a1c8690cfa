"""Data sets whose rows hold ready prompts, in the columns that kvpress gave them.

Their columns are `context`, `question`, `answer_prefix`, `answer` (or `answers`), `task`, `max_new_tokens` and, for
classification, `all_classes`: RULER (Hsieh et al. 2024), LongBench and LongBench-E (Bai et al. 2023), LongBench-v2
(Bai et al. 2024) and InfiniteBench (Zhang et al. 2024). The prompts are the data sets' own.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from evals.task import Example
from evals.tasks.hub import Row, read
from evals.tasks.length import cut_middle, prompt_tokens, tokens
from evals.tasks.ruler import METRICS as RULER_METRICS
from evals.tasks.vocabulary import listed

RULER, LONGBENCH = "simonjegou/ruler", "Xnhyacinth/LongBench"
LONGBENCH_V2, INFINITEBENCH = "Xnhyacinth/LongBench-v2", "MaxJeblick/InfiniteBench"
RULER_LENGTHS = (4096, 8192, 16384)

# LongBench's other three (multifieldqa_zh, dureader, vcsum) are judged on words that a Chinese segmenter finds.
LONGBENCH_METRICS = {
    "narrativeqa": "squad_f1",
    "qasper": "squad_f1",
    "multifieldqa_en": "squad_f1",
    "hotpotqa": "squad_f1",
    "2wikimqa": "squad_f1",
    "musique": "squad_f1",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "trec": "classification",
    "triviaqa": "squad_f1",
    "samsum": "rouge_l",
    "lsht": "classification",
    "passage_count": "count",
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}
LONGBENCH_E = listed(
    "qasper,multifieldqa_en,hotpotqa,2wikimqa,gov_report,multi_news,trec,triviaqa,samsum,passage_count,"
    "passage_retrieval_en,lcc,repobench-p"
)
# Tasks with examples in their context go on with another one after the answer's line.
ONE_LINE = {"trec", "triviaqa", "samsum", "lsht"}
# Tasks whose contexts are passages, which methods may reuse one by one.
OF_PASSAGES = {"hotpotqa", "2wikimqa", "musique"}
_PASSAGE = re.compile(r"(?=^Passage \d+:$)", re.MULTILINE)
INFINITEBENCH_METRICS = {
    "passkey": "first_number",
    "number_string": "first_number",
    "kv_retrieval": "string_match_part",
    "longbook_qa_eng": "squad_f1",
    "longbook_choice_eng": "choice",
    "longbook_sum_eng": "rouge_l",
    "longbook_qa_chn": "character_f1",
    "longdialogue_qa_eng": "string_match_part",
    "math_find": "first_number",
    "math_calc": "leading_numbers",
    "code_run": "last_number",
    "code_debug": "choice",
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """Prompts as a data set has them; LongBench's passages are documents.

    Attributes:
        name: As on the command line.
        metric: Name of a module in `evals/metrics`.
        data_set: Id on the Hub.
        config: Which of its configurations; of RULER the length decides.
        source: A folder with the data set's files.
        cut: Whether contexts that are too long lose their middle; if not, their questions are left out.
    """

    name: str
    metric: str
    data_set: str
    config: str | None
    source: str | None
    cut: bool = True

    def examples(self, tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Example]:
        """See `Task.examples`. Questions about one context follow each other."""
        config = self.config or self._ruler_length(length)
        task = self.name.split("/")[1] if self.data_set == RULER else None
        rows = read(self.data_set, config, "test", self.source, task)
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        drawn = (self._example(rows[place], f"{self.name}-{config}-{place}") for place in order)
        fitting = (example for example in drawn if self.cut or prompt_tokens(tokenizer, example) <= length)
        chosen = list(islice(fitting, count))
        if len(chosen) < count:
            raise ValueError(
                f"{self.name} has {len(chosen)} questions (of {len(rows)}) that fit {length} tokens, count is {count}"
            )
        together: dict[str, list[Example]] = {}
        for example in chosen:
            together.setdefault(example.context, []).append(example)
        for same in together.values():
            yield from _fitted(tokenizer, same, length)

    def _ruler_length(self, length: int) -> str:
        known = [known for known in RULER_LENGTHS if known <= length]
        if not known:
            raise ValueError(f"{self.name} has prompts of {RULER_LENGTHS} tokens, length is {length}")
        return str(known[-1])

    def _example(self, row: Row, name: str) -> Example:
        answers = row["answers"] if "answers" in row else row["answer"]
        task, prefix = row["task"].removesuffix("_e"), row["answer_prefix"] or ""
        return Example(
            id=name,
            context=row["context"],
            question=_apart(row["question"], prefix),
            answers=(answers,) if isinstance(answers, str) else tuple(answers),
            max_new_tokens=int(row["max_new_tokens"]),
            answer_prefix=prefix,
            stop="\n" if task in ONE_LINE else None,
            kind=self._kind(row),
            documents=_passages(row["context"]) if task in OF_PASSAGES else (),
            choices=tuple(row.get("all_classes") or ()),
        )

    def _kind(self, row: Row) -> str:
        """Return what LongBench-E and -v2 report apart: how long the context is, in words or as a class."""
        match row.get("length"):
            case int(words) if self.name.startswith("longbench_e/"):
                return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"
            case str(label):
                return label
            case _:
                return ""


def _fitted(tokenizer: Any, same: list[Example], length: int) -> list[Example]:
    """Return examples of one context, which loses its middle until the longest of their prompts fits."""
    asked = [tokens(tokenizer, example.question + example.answer_prefix) for example in same]
    longest, room = asked.index(max(asked)), length - max(asked)
    fitted = same
    while prompt_tokens(tokenizer, fitted[longest]) > length:
        context = cut_middle(tokenizer, same[0].context, room, special=True)
        documents = _passages(context) if same[0].documents else ()
        fitted = [replace(example, context=context, documents=documents) for example in same]
        room -= 8  # passages, tokenized apart, have some tokens more than their text in one
    return fitted


def _apart(question: str, prefix: str) -> str:
    """Return the question, with a new line if the answer's prefix would run into it."""
    runs_in = prefix and question and not question[-1].isspace() and not prefix[0].isspace()
    return f"{question}\n" if runs_in else question


def _passages(context: str) -> tuple[str, ...]:
    """Return what stands before LongBench's passages, and each passage; what follows the last belongs to it."""
    parts = _PASSAGE.split(context)
    return tuple(parts) if len(parts) > 2 else ()


TASKS: dict[str, tuple[str, str, str | None, bool]] = {
    **{f"ruler_hub/{task}": (metric, RULER, None, False) for task, metric in RULER_METRICS.items()},
    **{f"longbench/{task}": (metric, LONGBENCH, task, True) for task, metric in LONGBENCH_METRICS.items()},
    **{f"longbench_e/{task}": (LONGBENCH_METRICS[task], LONGBENCH, f"{task}_e", True) for task in LONGBENCH_E},
    "longbench_v2": ("choice", LONGBENCH_V2, "0shot", True),
    **{f"infinitebench/{task}": (metric, INFINITEBENCH, task, True) for task, metric in INFINITEBENCH_METRICS.items()},
}
NAMES = tuple(TASKS)


def load(name: str, source: str | None) -> Rendered:
    """Return the task of this name; a source is a folder with the data set's files."""
    metric, data_set, config, cut = TASKS[name]
    return Rendered(name, metric, data_set, config, source, cut)
