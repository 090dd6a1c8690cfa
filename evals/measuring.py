"""One method on one group of contexts: its answers, how near they are to dense, and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evals.answering import Answers, Question, answer, now, teacher_forced
from evals.fidelity import allowed_gap, audit_gap, fidelity
from evals.memory import PeakMemory
from evals.method import Context, Method


@dataclass(frozen=True)
class Asked:
    """Contexts that are read together, and the questions about them.

    Attributes:
        context: The texts.
        questions: In order.
        rows: For each question the row of the context that it is about.
    """

    context: Context
    questions: tuple[Question, ...]
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> Asked:
        """Return it with its tokens on a device."""
        context = Context(
            tuple(row.to(device) for row in self.context.rows),
            tuple(tuple(part.to(device) for part in parts) for parts in self.context.documents),
            self.context.room,
        )
        questions = (replace(q, ids=q.ids.to(device)) for q in self.questions)
        return Asked(context, tuple(questions), self.rows)


@dataclass(frozen=True)
class Reference:
    """The dense answer to a question, and the logits it was chosen from, `[tokens, words]`."""

    ids: list[int]
    logits: Tensor


@torch.no_grad()
def measure(
    model: Any, method: Method, asked: Asked, batch_size: int, references: Sequence[Reference] | None = None
) -> tuple[list[dict[str, Any]], list[Reference]]:
    """Answer all questions with a method.

    Args:
        model: Its attention implementation is set to the method's.
        method: What holds the contexts.
        asked: Contexts and questions, on the model's device.
        batch_size: Questions that are answered together.
        references: The dense answers, to measure fidelity against.

    Returns:
        For each question its record's fields; and the method's own answers as references.

    Raises:
        ImportError: The method needs a library that is missing.
        ValueError: The method cannot serve this model or context, or holds something other than it says.
    """
    if model.config._attn_implementation != method.attention:
        model.set_attn_implementation(method.attention)
    records: list[dict[str, Any]] = []
    found: list[Reference] = []
    with PeakMemory(model.device) as memory:
        start = now(model.device)
        cache = method.prepare(model, asked.context)
        prepare_s = now(model.device) - start
    method.check(cache)
    shared = {
        "prepare_s": round(prepare_s, 6),
        "resident_bytes": method.resident_bytes(cache),
        "peak_bytes": memory.bytes,
        "context_tokens": max(map(len, asked.context.rows)),
    }
    mask = asked.context.mask
    for first in range(0, len(asked.questions), batch_size):
        batch = slice(first, first + batch_size)
        questions, rows = asked.questions[batch], torch.tensor(asked.rows[batch], device=mask.device)

        def fork(rows: Tensor = rows) -> Any:
            other = method.fork(cache)
            if len(rows) != len(mask) or len(mask) > 1:
                other.batch_select_indices(rows)
            return other

        answers = answer(model, fork(), mask[rows], questions)
        own = teacher_forced(model, fork(), mask[rows], questions, answers.ids)
        dense = (
            references[batch]
            if references is not None
            else [Reference(*x) for x in zip(answers.ids, own, strict=True)]
        )
        forced = own
        if any(reference.ids != ids for reference, ids in zip(dense, answers.ids, strict=True)):
            forced = teacher_forced(model, fork(), mask[rows], questions, [one.ids for one in dense])
        for i, reference in enumerate(dense):
            near = fidelity(reference.logits, forced[i], reference.ids)
            gap = 0.0 if questions[i].given else audit_gap(own[i], answers.ids[i])
            records.append(
                {
                    "answer_ids": answers.ids[i],
                    "audit_gap": float(f"{gap:.3g}"),
                    "audited": gap <= allowed_gap(model.dtype),
                    "fidelity": near.to_json() | {"same_answer": answers.ids[i] == reference.ids},
                    "cost": shared | _cost(answers, len(questions)),
                }
            )
        found += [Reference(*pair) for pair in zip(answers.ids, own, strict=True)]
    return records, found


def _cost(answers: Answers, batch: int) -> dict[str, Any]:
    token_s = statistics.median(answers.token_s) if answers.token_s else None
    return {
        "question_s": round(answers.question_s, 6),
        "token_s": token_s if token_s is None else round(token_s, 6),
        "batch": batch,
    }
