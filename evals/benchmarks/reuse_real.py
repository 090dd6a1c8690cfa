"""What reuse of stored documents costs a pretrained model in answers: SmolLM2-135M-Instruct, all heads global."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache

from evals.benchmarks.reuse import Case, answers, read_whole
from evals.methods.reuse import only_prefix
from evals.real.contexts import Asked
from evals.real.reuse_summary import DENSE, Row
from redknot_hf import HeadPlan, HeadSpec, SegmentRef, SegmentStore, StandIn, assemble, by_rank, refresh

STAND_IN = 2048
# The most that is recomputed for a question, and tokens of a pass: what it takes of them decides how many questions,
# each with a cache of its own, are answered in one batch.
_MOST, _PASS = 0.15, 8192


Build = Callable[[Any, list[SegmentRef], Sequence[Asked]], Any]


@dataclass(frozen=True)
class Method:
    """A way to the caches of questions.

    Attributes:
        stand_in: Whether documents were stored behind one.
        build: Makes the cache of some questions about a context, from the model and the segments.
        together: Which questions have a cache in common: `"all"` one for all, `"each"` a row of a batch for each,
            `"ranked"` one for those of which the same documents are ranked best.
    """

    stand_in: bool
    build: Build
    together: str = "all"


def known(share: float) -> Build:
    """Recomputes for each question what stands near its words."""
    return lambda model, refs, asked: assemble(
        model, [refs] * len(asked), question=[q.prompt for q in asked], share=share
    )


def methods() -> dict[str, Method]:
    """All methods by name: nothing known of the question, then the question, then a ranking of the documents."""
    return {
        "naive": Method(False, lambda m, refs, _: assemble(m, refs, boundary=0)),
        "boundary 10 %": Method(False, lambda m, refs, _: assemble(m, refs, boundary=0.1)),
        "boundary 20 %": Method(False, lambda m, refs, _: assemble(m, refs, boundary=0.2)),
        "deviation 15 %": Method(False, lambda m, refs, _: refresh(m, refs, share=0.15)),
        "attention 15 %": Method(False, lambda m, refs, _: refresh(m, refs, share=0.15, by="attention")),
        "prefix cache only": Method(False, lambda m, refs, _: assemble(m, refs, boundary=only_prefix)),
        "boundary all": Method(False, lambda m, refs, _: assemble(m, refs, boundary="all")),
        "stand-in": Method(True, lambda m, refs, _: assemble(m, refs, boundary=0)),
        "stand-in, boundary 20 %": Method(True, lambda m, refs, _: assemble(m, refs, boundary=0.2)),
        "stand-in, deviation 15 %": Method(True, lambda m, refs, _: refresh(m, refs, share=0.15)),
        "question 15 %": Method(False, known(0.15), "each"),
        "stand-in, question 5 %": Method(True, known(0.05), "each"),
        "stand-in, question 15 %": Method(True, known(0.15), "each"),
        "stand-in, two ranked best": Method(
            True, lambda m, refs, asked: assemble(m, refs, boundary=by_rank(_ranks(asked[0], len(refs)))), "ranked"
        ),
        "stand-in, ranked best, question 12 %": Method(
            True,
            lambda m, refs, asked: assemble(
                m, [refs] * len(asked), boundary=by_rank(_ranks(asked[0], len(refs)), 1),
                question=[q.prompt for q in asked], share=0.12,
            ),
            "ranked",
        ),
    }  # fmt: skip


def _ranks(asked: Asked, segments: int) -> list[float | None]:
    """What a retriever says that puts the answer's document first or second, another one beside it."""
    scores: list[float | None] = [None, *[0.0] * (segments - 1)]
    other = asked.document % (segments - 1) + 1
    first = random.Random(asked.document).random() < 0.5
    scores[asked.document], scores[other] = (2.0, 1.0) if first else (1.0, 2.0)
    return scores


def answered(model: Any, case: Case, dense: DynamicCache, tokens: int = 24) -> Case:
    """The case with what dense says for an answer, where a question has none."""
    open_ones = [q for q in case.questions if not q.answer]
    said: list[list[int]] = [[] for _ in open_ones]
    for _ in range(tokens if open_ones else 0):
        asked = [replace(q, answer=[*so_far, 0]) for q, so_far in zip(open_ones, said, strict=True)]  # pyright: ignore
        found = answers(model, dense, replace(case, questions=asked))
        for so_far, logits in zip(said, found, strict=True):
            so_far.append(int(logits[-1].argmax()))
    texts = iter(said)
    return replace(case, questions=[q if q.answer else replace(q, answer=next(texts)) for q in case.questions])


def measure(
    model: Any, made: Sequence[tuple[int, Case, StandIn]], chosen: dict[str, Method], seconds: float
) -> Iterator[Row]:
    """Runs all methods on all contexts, or on those that are begun within so many seconds; yields rows."""
    end, plan = time.monotonic() + seconds, HeadPlan.uniform(model.config, HeadSpec())
    for index, bare, stand_in in track(made, description="contexts"):
        if time.monotonic() > end:
            break
        model.set_attn_implementation("sdpa")
        dense = DynamicCache(config=model.config)
        read_whole(model, dense, bare)
        case = answered(model, bare, dense)
        wanted = answers(model, dense, case)
        model.set_attn_implementation("redknot")
        yield from rows(index, DENSE, 1.0, case.questions, wanted, wanted)
        opening, *documents = case.documents
        stored: dict[bool, list[SegmentRef]] = {}
        for name, method in chosen.items():
            if method.stand_in not in stored:
                before = stand_in if method.stand_in else None
                store = SegmentStore(model, plan, keep="full", identity="evaluated", stand_in=before)
                stored[method.stand_in] = [store.add(opening), *store.add_all(documents, opening)]
            recomputed, found = run(model, case, stored[method.stand_in], method)
            yield from rows(index, name, recomputed, case.questions, found, wanted)


def run(model: Any, case: Case, refs: list[SegmentRef], method: Method) -> tuple[float, list[Tensor]]:
    """Answers a context's questions; says also what share of the context was recomputed, on average."""
    found: dict[int, Tensor] = {}
    recomputed = 0.0
    at_once = max(1, _PASS // math.ceil(_MOST * len(case.ids)))
    for group in groups(case.questions, method.together, len(refs), at_once):  # pyright: ignore[reportArgumentType]
        asked = [case.questions[i] for i in group]
        cache = method.build(model, refs, asked)  # pyright: ignore[reportArgumentType]
        each = len(cache.reused)
        recomputed += len(group) * cache.recomputed_tokens / each / len(case.ids)
        found |= zip(group, answers(model, cache, replace(case, questions=asked), shared=each == 1), strict=True)
    return recomputed / len(case.questions), [found[i] for i in range(len(case.questions))]


def groups(questions: Sequence[Asked], together: str, segments: int, at_once: int) -> Iterator[list[int]]:
    """Which questions have their caches made together."""
    if together == "all":
        yield [*range(len(questions))]
        return
    by_key: dict[Any, list[int]] = {}
    for i, asked in enumerate(questions):
        by_key.setdefault(tuple(_ranks(asked, segments)) if together == "ranked" else i // at_once, []).append(i)
    yield from by_key.values()


def rows(
    index: int, method: str, recomputed: float, questions: Sequence[Any], found: Sequence[Tensor],
    wanted: Sequence[Tensor],
) -> Iterator[Row]:  # fmt: skip
    """Judges the answers to one context's questions: a row a kind, of sums over its questions."""
    tokens = [len(mine) for mine in found]
    mine, dense = torch.cat(list(found)), torch.cat(list(wanted))
    said = torch.tensor([token for question in questions for token in question.answer], device=mine.device)
    columns = torch.stack([
        (mine.argmax(-1) == said).float(), (dense.exp() * (dense - mine)).sum(-1),
        (mine.argmax(-1) == dense.argmax(-1)).float(),
    ], -1).cpu().split(tokens)  # fmt: skip
    for kind in dict.fromkeys(question.kind for question in questions):
        some = [column for column, question in zip(columns, questions, strict=True) if question.kind == kind]
        yield {
            "context": index, "method": method, "kind": kind, "recomputed": recomputed, "questions": len(some),
            "right": sum(float(column[:, 0].min()) for column in some),
            "kl": sum(max(0.0, float(column[:, 1].mean())) for column in some),
            "top1": sum(float(column[:, 2].mean()) for column in some),
        }  # fmt: skip
