"""What the commands of `evals.commands` share once they run; it needs what the extra `evals` installs."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from transformers.utils.logging import disable_progress_bar

from evals import tasks
from evals.audit import AuditError
from evals.bench import BUNDLED, Bench, load_bench
from evals.methods import Setting, load_all
from evals.records import RecordFile, Records
from evals.running import Plan, UnwritableError
from evals.running import run as run_task
from evals.summary import Row
from redknot_hf import HeadPlan


def load(model: str, chat: bool = False, dtype: str = "auto", device: str | None = None) -> Bench:
    """Load a model; what is wrong with its name ends the command in a line."""
    disable_progress_bar()
    try:
        return load_bench(model, dtype, device, chat)
    except (ValueError, FileNotFoundError) as e:
        raise SystemExit(f"error: {e}") from e


def answer(
    bench: Bench,
    names: list[str],
    out: Path,
    methods: list[str],
    paths: list[Path],
    lengths: list[int],
    how: tuple[int, int, int, str | None],
) -> None:
    """Answer tasks of each length with each method, into a file; what is wrong with them ends the command in a line.

    Args:
        bench: The model.
        names: Of the tasks.
        out: JSON lines; what they hold already is not made again.
        methods: As the command line takes them.
        paths: Of head plans.
        lengths: Tokens of a prompt, at most.
        how: Examples of each task and length, their seed, how many are answered together, and where tasks read.
    """
    count, seed, batch_size, source = how
    left_out: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        held = plans(bench, paths)
        with RecordFile(out) as file, Progress(*columns, console=Console(stderr=True)) as progress:
            for name in names:
                for length in lengths:
                    path, plan = held[0] if held else (None, None)
                    found = load_all(methods, Setting(bench.model.config, length, plan, path), held)
                    work = Plan(tasks.load(name, source), length, count, seed, batch_size)
                    try:
                        run_task(bench, work, found, file, progress, go_on=True)
                    except UnwritableError as e:
                        left_out.append(f"{e}")
    except (AuditError, ValueError, ImportError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    if len(left_out) == len(names) * len(lengths):
        raise SystemExit(f"error: {left_out[0]}")
    for reason in left_out:
        Console(stderr=True).print(f"left out: {reason}", markup=False)


def plans(bench: Bench, paths: list[Path]) -> list[tuple[Path, HeadPlan]]:
    """Load head plans; the bundled model's, where none is named for it."""
    if not paths and bench.name == "bundled":
        paths = [BUNDLED / "plan.json"]
    return [(path, HeadPlan.load(path, bench.model.config)) for path in paths]


def show(rows: list[Row]) -> None:
    """Print the figures that matter most, a table for each task and length."""
    for (task, length), same in groupby(rows, key=lambda row: (row.run.task, row.run.length)):
        numbers = (Column(name, justify="right") for name in ("answers", "score", "top-1 %", "KL", "MiB", "ms/token"))
        verdict = Column("score to dense", min_width=14)  # so that all of it stands in 80 columns
        table = Table("method", *numbers, verdict, title=f"{task}, {length} tokens", box=SIMPLE_HEAD)
        for row in same:
            table.add_row(
                row.name, str(row.answers), f"{row.score.value:.1f}", f"{row.top1.value:.1f}", f"{row.kl.value:.2g}",
                f"{row.resident_bytes / 2**20:.1f}", "-" if row.token_s is None else f"{1e3 * row.token_s:.1f}",
                row.verdict,
            )  # fmt: skip
        Console().print(table)


def show_failures(records: Records) -> None:
    """Print which methods failed on what, and why."""
    for key, reason in records.failures.items():
        failed = records.runs[key]
        Console().print(f"{failed.name} failed on {failed.task}, {failed.length} tokens: {reason}", markup=False)
