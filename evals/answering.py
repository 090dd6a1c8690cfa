"""Answers, decoded greedily from a fork of the cache that holds their context, and the time that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from evals.method import by_name, pad_left, positions_of


@dataclass(frozen=True)
class Question:
    """What is asked about a context.

    Attributes:
        ids: Tokens of the question and of the words put into the model's mouth, `[tokens]`.
        max_new_tokens: Tokens of the answer at most.
        done: Whether an answer of these tokens is complete.
        given: Tokens of the answer, where it is not to be decoded but scored.
    """

    ids: Tensor
    max_new_tokens: int
    done: Callable[[list[int]], bool]
    given: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answers:
    """Answers to questions that were asked together.

    Attributes:
        ids: Tokens of each answer, with what ended it.
        question_s: Seconds from the questions to the first tokens.
        token_s: Seconds of each later step.
    """

    ids: list[list[int]]
    question_s: float
    token_s: list[float]


def now(device: torch.device) -> float:
    """Return the time when the device is done with all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def answer(model: Any, cache: Cache, mask: Tensor, questions: Sequence[Question]) -> Answers:
    """Ask each row of a cache its question and decode the answers.

    Args:
        model: Runs with the attention that the cache needs.
        cache: Holds the contexts; mutated.
        mask: Which of its slots hold tokens, `[questions, slots]`.
        questions: One a row.
    """
    start = now(mask.device)
    padded, mask = _append(mask, [question.ids for question in questions])
    token = _step(model, cache, padded, mask, 1)[:, -1].argmax(-1)
    answers = [list(question.given) or [int(first)] for question, first in zip(questions, token, strict=True)]
    question_s = now(mask.device) - start
    token_s: list[float] = []
    while open_rows := [i for i, question in enumerate(questions) if not _ended(question, answers[i])]:
        start = now(mask.device)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = _step(model, cache, token[:, None], mask, 1)[:, -1].argmax(-1)
        found = token.tolist()
        for i in open_rows:
            answers[i].append(found[i])
        token_s.append(now(mask.device) - start)
    return Answers(answers, question_s, token_s)


@torch.no_grad()
def teacher_forced(
    model: Any, cache: Cache, mask: Tensor, questions: Sequence[Question], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return the logits from which each answer's tokens would be chosen, given the tokens before: `[tokens, words]`.

    Question and answer go through the model in one step.

    Args:
        model: Runs with the attention that the cache needs.
        cache: Holds the contexts; mutated.
        mask: Which of its slots hold tokens, `[questions, slots]`.
        questions: One a row.
        answers: Tokens of each answer, one at least.
    """
    given = [
        torch.cat([question.ids, question.ids.new_tensor(list(tokens[:-1]))])
        for question, tokens in zip(questions, answers, strict=True)
    ]
    padded, mask = _append(mask, given)
    logits = _step(model, cache, padded, mask, max(map(len, answers)))
    return [row[-len(tokens) :].float() for row, tokens in zip(logits, answers, strict=True)]


def _append(mask: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad new tokens, and lengthen the mask by them."""
    new = pad_left([torch.ones_like(row) for row in rows])
    return pad_left(rows), torch.cat([mask, new.to(mask)], dim=1)


def _step(model: Any, cache: Cache, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    positions = positions_of(mask)[:, -ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, **by_name(cache)
    ).logits


def _ended(question: Question, tokens: list[int]) -> bool:
    return bool(question.given) or len(tokens) >= question.max_new_tokens or question.done(tokens)
