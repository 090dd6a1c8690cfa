"""A gate that a plan must pass before it is used: near enough to the dense cache on a task, measured."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from evals import tasks
from evals.bench import Bench, make_bench
from evals.limits import Limits
from evals.method import Method, dense
from evals.methods.redknot import redknot
from evals.records import RecordFile
from evals.running import Plan, run
from evals.summary import Row, summarize
from evals.task import Task
from redknot_hf import HeadPlan


@dataclass(frozen=True)
class Passage:
    """What the gate measured.

    Attributes:
        row: All figures of the method.
        limits: What they were held against.
        missed: What the method falls short of, in words; nothing if it passes.
    """

    row: Row
    limits: Limits
    missed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was missed."""
        return not self.missed

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        row = self.row
        apart = row.score_difference
        points = "" if apart is None else f", {apart.value:+.1f} points to dense"
        head = f"{'passes' if self.passed else 'FAILS'}: {row.name} on {row.run.task} at {row.run.length} tokens"
        figures = f"score {row.score.value:.1f}{points}, top-1 {row.top1.value:.1f} %, KL {row.kl.value:.3g} mean"
        size = "" if row.dense_share is None else f", {row.dense_share:.0%} of dense bytes"
        return "\n".join(
            [head, f"  {figures}, {row.kl_p99:.3g} p99, {row.answers} answers{size}", *map("  ".__add__, self.missed)]
        )


def gate(  # noqa: PLR0913 - each says what is asked of whom
    model: Any,
    plan: HeadPlan | Method,
    *,
    tokenizer: Any = None,
    task: str | Task = "tiny/plain",
    length: int = 4096,
    count: int = 120,
    seed: int = 0,
    batch_size: int = 1,
    limits: Limits | None = None,
    name: str = "model",
    chat: bool = False,
) -> Passage:
    """Measure a plan, or any method, against the dense cache; the result is true if it passes.

    Args:
        model: Its attention implementation is changed, and set back.
        plan: A head plan, or a method.
        tokenizer: The model's; by default that of the place it was loaded from.
        task: A task or its name.
        length: Tokens of the prompts, at most.
        count: Examples; an interval needs five contexts.
        seed: Of the examples.
        batch_size: Questions that are answered together.
        limits: What to hold it against.
        name: How the model is called in the figures.
        chat: Ask in the words of the tokenizer's chat template.

    Raises:
        ValueError: The plan does not fit the model, or the task does not fit the tokenizer.
        AuditError: The answers do not come from the cache that was measured.
    """
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    method = redknot(plan) if isinstance(plan, HeadPlan) else plan
    work = Plan(tasks.load(task) if isinstance(task, str) else task, length, count, seed, batch_size)
    attention = model.config._attn_implementation
    try:
        row = _measured(make_bench(model, tokenizer, name, chat), work, method)
    finally:
        model.set_attn_implementation(attention)
    limits = limits or Limits()
    return Passage(row, limits, tuple(_missed(row, limits)))


def _measured(bench: Bench, work: Plan, method: Method) -> Row:
    with tempfile.TemporaryDirectory() as folder, RecordFile(Path(folder) / "gate.jsonl") as file:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            run(bench, work, [dense(), method], file, progress)
        return next(row for row in summarize(file.records) if row.name == method.name)


def _missed(row: Row, limits: Limits) -> Sequence[str]:
    missed = []
    apart = row.score_difference
    assert apart is not None
    worst = apart.value if apart.low is None else apart.low
    if worst < -limits.points:
        missed.append(f"may lose {-worst:.1f} points of score, and {limits.points:g} are allowed")
    if row.top1.value < limits.top1:
        missed.append(f"chooses {row.top1.value:.1f} % of the tokens as dense does, and {limits.top1:g} % are asked")
    if row.kl.value > limits.kl:
        missed.append(f"KL(dense || it) is {row.kl.value:.3g} nats a token, and {limits.kl:g} are allowed")
    return missed
