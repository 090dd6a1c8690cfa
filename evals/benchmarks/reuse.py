"""What reusing stored documents costs in quality, and saves in time, by how much of them is recomputed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache

from evals import answering
from evals.benchmarks.reuse_figures import PARTS, WHOLE, Scores
from evals.fidelity import fidelity
from evals.method import Context, read
from evals.methods.reuse import Reuse, refreshed, reuse
from evals.tiny.corpus import Corpus
from evals.tiny.facts import Question
from evals.tiny.lexicon import Lexicon
from redknot_hf import HeadPlan, RedKnotCache, SegmentRef

TINY = Path(__file__).parents[1] / "tiny"
# Seeds of texts that the model was not trained on.
SEED = 20_000


@dataclass(frozen=True)
class Case:
    """A context and what is asked about it.

    Attributes:
        part: Of `PARTS`.
        documents: Token ids; the first is the `<bos>` that every text begins with.
    """

    part: str
    documents: list[list[int]]
    questions: list[Question]

    @property
    def ids(self) -> list[int]:
        return [token for document in self.documents for token in document]

    def context(self, device: torch.device) -> Context:
        """The context as the harness's methods take it."""
        parts = tuple(torch.tensor(document, device=device) for document in self.documents)
        room = max((len(q.prompt) + len(q.answer) for q in self.questions), default=0)
        return Context((torch.cat(parts),), (parts,), room)


def methods(plan: HeadPlan) -> dict[str, Reuse]:
    """The harness's methods of reuse by the names of this benchmark, from least to most recomputing."""
    return {
        "naive, no prefix": reuse(plan, 0, prefix=0),
        "naive": reuse(plan, 0),
        "boundary 16 tokens": reuse(plan, 16),
        "boundary 5 %": reuse(plan, 0.05),
        "boundary 10 %": reuse(plan, 0.1),
        "boundary 20 %": reuse(plan, 0.2),
        "boundary 50 %": reuse(plan, 0.5),
        "deviation 15 %": refreshed(plan, 0.15),
        "attention 15 %": refreshed(plan, 0.15, "attention"),
        "prefix cache only": reuse(plan, "prefix"),
        "boundary all": reuse(plan, "all"),
    }


def cases(part: str, count: int, documents: int, tokens: int, questions: int) -> Iterator[Case]:
    """Contexts of one part, always the same."""
    lexicon = Lexicon()
    begin = lexicon.id["<doc>"]
    for i in range(count):
        seed = SEED + i + 1000 * list(PARTS).index(part)
        made = Corpus(lexicon, seed).collection(documents * tokens, questions, PARTS[part], documents)
        seams = [0, *(at for at, token in enumerate(made.context) if token == begin), len(made.context)]
        bos, *parts = [made.context[a:b] for a, b in pairwise(seams)]
        if part == "single facts":
            np.random.default_rng(seed).shuffle(parts)
        yield Case(part, [bos, *parts], made.questions)


def answers(model: Any, cache: Any, case: Case, *, shared: bool = True) -> list[Tensor]:
    """Log-probabilities of the tokens of each answer, `[answer tokens, vocabulary]`, all questions in one batch.

    Args:
        model: Runs on what the cache is of.
        cache: Holds the context once, which all questions share, or once for each question; that one is used up.
        case: The context and its questions.
        shared: Which of both.
    """
    if shared:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(case.questions))
    texts = [q.answer for q in case.questions]
    asked = [
        answering.Question(torch.tensor(q.prompt, device=model.device), len(q.answer), bool, tuple(q.answer))
        for q in case.questions
    ]
    mask = torch.ones(len(asked), len(case.ids), dtype=torch.long, device=model.device)
    return [x.log_softmax(-1) for x in answering.teacher_forced(model, cache, mask, asked, texts)]


def score(scores: Scores, index: int, case: Case, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Judges the answers to one context's questions."""
    for question, mine, theirs in zip(case.questions, found, wanted, strict=True):
        scores.context.append(index)
        scores.kind.append(question.kind)
        scores.right.append(mine.argmax(-1).tolist() == question.answer)
        scores.kl.append(max(0.0, float(np.mean(fidelity(theirs, mine, question.answer).kl))))


def read_whole(model: Any, cache: Any, case: Case) -> float:
    """Reads a context into a cache; returns the seconds it took."""
    start = answering.now(model.device)
    read(model, cache, case.context(model.device))
    return answering.now(model.device) - start


def measure(model: Any, plan: HeadPlan, all_cases: Sequence[Case], chosen: dict[str, Reuse]) -> dict[str, Scores]:
    """Runs all methods on all contexts."""
    results = {name: Scores() for name in ["dense", WHOLE, *chosen]}
    for index, case in enumerate(track(all_cases, description="contexts")):
        whole, dense = RedKnotCache(model.config, plan), DynamicCache(config=model.config)
        seconds = {WHOLE: read_whole(model, whole, case)}
        model.set_attn_implementation("sdpa")
        seconds["dense"] = read_whole(model, dense, case)
        found = {"dense": answers(model, dense, case)}
        model.set_attn_implementation("redknot")
        found[WHOLE] = answers(model, whole, case)
        for name in ("dense", WHOLE):
            _note(results[name], seconds[name], seconds[name], 1.0)
        stores: dict[tuple[bool, bool], tuple[list[list[SegmentRef]], float]] = {}
        for name, method in chosen.items():
            key = method.boundary is None, method.prefix
            if key not in stores:
                stores[key] = _stored(model, case, method)
            rows, storing = stores[key]
            start = answering.now(model.device)
            cache = method.build(model, rows)
            hot = answering.now(model.device) - start
            _note(results[name], storing + hot, hot, cache.recomputed_tokens / len(case.ids))
            found[name] = answers(model, cache, case)
        for name, mine in found.items():
            score(results[name], index, case, mine, found[WHOLE])
    return results


def _note(scores: Scores, cold: float, hot: float, recomputed: float) -> None:
    scores.cold.append(cold)
    scores.hot.append(hot)
    scores.recomputed.append(recomputed)


def _stored(model: Any, case: Case, method: Reuse) -> tuple[list[list[SegmentRef]], float]:
    """The documents in a new store, and the seconds it took; the store's check of the model is not part of it."""
    fresh = replace(method, stores=[])
    fresh.store(model)
    start = answering.now(model.device)
    rows = fresh.stored(model, case.context(model.device))
    return rows, answering.now(model.device) - start
