"""Runs: every method answers the same examples, and what it answered is written down at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress

from evals import metrics
from evals.audit import AuditError
from evals.bench import Bench
from evals.identity import hardware, model_identity, versions
from evals.measuring import Reference, measure
from evals.method import Method, dense
from evals.methods.kvpress import Press
from evals.peer import PressWorker
from evals.questions import Group
from evals.records import RecordFile, Run
from evals.task import Task


class UnwritableError(ValueError):
    """A model's tokenizer has no words for a task."""


@dataclass(frozen=True)
class Plan:
    """Which examples a run asks.

    Attributes:
        task: Their source.
        length: Tokens of a prompt, at most.
        count: Examples.
        seed: Of the examples.
        batch_size: Questions that are answered together.
    """

    task: Task
    length: int
    count: int
    seed: int = 0
    batch_size: int = 1


def run(
    bench: Bench,
    work: Plan,
    methods: Sequence[Method | Press],
    file: RecordFile,
    progress: Progress,
    go_on: bool = False,
) -> None:
    """Answer a task's examples with every method, leaving out what the file already has.

    Args:
        go_on: A method that raises is written down as failed, and the others go on.

    Raises:
        AuditError: Answers did not come from the cache that was measured. They are in the file, marked.
        ValueError: A method cannot serve the model or the task's contexts, or the task is no question and a chat
            template stands around it.
    """
    if bench.reader.chat is not None and work.task.metric == "likelihood":
        raise ValueError(
            f"{work.task.name} asks how likely a text is, and nothing of an assistant: ask without --chat"
        )
    torch.manual_seed(work.seed)
    ours = [method for method in methods if isinstance(method, Method)]
    presses = [method for method in methods if isinstance(method, Press)]
    runs = {method.name: _run(bench, work, method) for method in ours}
    runs |= {press.name: _run(bench, work, press, PressWorker.versions()) for press in presses}
    for one in runs.values():
        file.begin(one)
    examples = work.task.examples(bench.tokenizer, work.length - bench.reader.overhead, work.count, work.seed)
    groups = _written(bench, work, bench.reader.groups(examples, work.batch_size))
    title = f"{work.task.name} at {work.length}"
    left = {name: [_left(group, one, file) for group in groups] for name, one in runs.items()}
    total = sum(len(ids) for lists in left.values() for ids in lists)
    bar = progress.add_task(title, total=total)
    judge = _judge(bench, work.task)

    def keep(name: str, group: Group, answers: list[dict[str, Any]]) -> None:
        file.add(runs[name], judge(group, answers))
        progress.update(bar, advance=len(answers), description=f"{title}: {name}")

    def fail(names: Sequence[str], reason: Exception) -> None:
        if not go_on:
            raise reason
        for name in names:
            file.fail(runs[name], _in_a_line(reason))
            left[name] = [set() for _ in groups]

    for i, group in enumerate(groups):
        _ask(bench, work, ours, group, {name: left[name][i] for name in runs}, keep, fail)
    try:
        _ask_presses(bench, presses, groups, left, keep)
    except Exception as e:
        fail([press.name for press in presses], e)
    _check_audits(file, runs.values())


def _ask_presses(
    bench: Bench,
    presses: Sequence[Press],
    groups: Sequence[Group],
    left: dict[str, list[set[str]]],
    keep: Callable[[str, Group, list[dict[str, Any]]], None],
) -> None:
    if any(any(left[press.name]) for press in presses):
        with PressWorker(bench, presses) as worker:
            for i, group in enumerate(groups):
                worker.ask(group, {press.name: left[press.name][i] for press in presses}, keep)


def _written(bench: Bench, work: Plan, groups: Iterable[Group]) -> list[Group]:
    """The questions, unless the tokenizer has no words for them."""
    try:
        return list(groups)
    except Exception as e:
        if type(e) is not Exception:  # where a word is missing, tokenizers raise the bare one
            raise
        raise UnwritableError(f"{work.task.name}: the tokenizer of {bench.name} has no words for it ({e})") from e


def _in_a_line(reason: Exception) -> str:
    last = next(iter(reversed([line for line in str(reason).splitlines() if line.strip()])), "")
    return f"{type(reason).__name__}: {last.strip()[:200]}"


def _ask(
    bench: Bench,
    work: Plan,
    methods: Sequence[Method],
    group: Group,
    left: dict[str, set[str]],
    keep: Callable[[str, Group, list[dict[str, Any]]], None],
    fail: Callable[[Sequence[str], Exception], None],
) -> None:
    """Ask a group's open questions. The dense cache always answers first: it is what the others are held against."""
    reference = next((method for method in methods if method.name == "dense"), dense())
    wanted = set[str]().union(*(left[method.name] for method in methods))
    if not wanted:
        return
    part = group.only(wanted)
    asked = part.asked.to(bench.model.device)
    answers, references = measure(bench.model, reference, asked, work.batch_size)
    by_id = dict(zip((example.id for example in part.examples), references, strict=True))
    for method in methods:
        if not left[method.name]:
            continue
        mine = part.only(left[method.name])
        if method is reference:
            found = [a for a, example in zip(answers, part.examples, strict=True) if example.id in left[method.name]]
        else:
            held: list[Reference] = [by_id[example.id] for example in mine.examples]
            try:
                found = _measure(bench, method, mine, work.batch_size, held)
            except Exception as e:
                fail([method.name], e)
                continue
        keep(method.name, mine, found)


def _measure(
    bench: Bench, method: Method, group: Group, batch_size: int, held: list[Reference]
) -> list[dict[str, Any]]:
    if method.batched:
        return measure(bench.model, method, group.asked.to(bench.model.device), batch_size, held)[0]
    found: list[dict[str, Any]] = []
    for row in sorted(set(group.asked.rows)):
        places = [i for i, at in enumerate(group.asked.rows) if at == row]
        part = group.only({group.examples[i].id for i in places})
        asked = part.asked.to(bench.model.device)
        found += measure(bench.model, method, asked, 1, [held[i] for i in places])[0]
    return found


def _judge(bench: Bench, task: Task) -> Callable[[Group, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return what makes records of answers: what they say, and how good they are."""
    metric = None if task.metric == "likelihood" else metrics.load(task.metric)

    def judge(group: Group, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        records = []
        for example, context, found in zip(group.examples, group.contexts, answers, strict=True):
            said = bench.reader.text(found["answer_ids"], example.stop)
            near = found["fidelity"]
            likely = math.exp(-near["nll"] / near["tokens"])  # one over the perplexity
            score = metric.score(said, example.answers, example.choices) if metric is not None else likely
            records.append(
                {"id": example.id, "context": context, "kind": example.kind, "answer": said, "score": score, **found}
            )
        return records

    return judge


def _left(group: Group, run: Run, file: RecordFile) -> set[str]:
    return {example.id for example in group.examples if not file.has(run, example.id)}


def _run(bench: Bench, work: Plan, method: Method | Press, by: dict[str, str] | None = None) -> Run:
    return Run(
        task=work.task.name,
        length=work.length,
        seed=work.seed,
        model=model_identity(bench.model, bench.name) | ({"chat": True} if bench.reader.chat else {}),
        method={"name": method.name, **method.identity},
        versions=by or versions(),
        hardware={**hardware(bench.model.device), "batch": work.batch_size},
    )


def _check_audits(file: RecordFile, runs: Any) -> None:
    keys = {one.key: one.name for one in runs}
    failed = [(keys[key], id) for (key, id), a in file.records.answers.items() if key in keys and not a["audited"]]
    if failed:
        name, example = failed[0]
        raise AuditError(
            f"{len(failed)} answers are not what the cache that was measured gives, the first of method {name!r} to "
            f"example {example}: they came another way, or the cache treats a token apart and many together unlike"
        )
