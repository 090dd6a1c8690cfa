"""What commands say on the terminal: errors and warnings in a line, and bars."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


@contextmanager
def told() -> Iterator[None]:
    """What is wrong with the input is said in a line, without a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warned
            yield
    except (ValueError, OSError, ImportError) as e:
        _say("error:", "red", e)
        raise typer.Exit(2) from e


def _warned(message: Warning | str, *_: Any) -> None:
    _say("warning:", "yellow", message)


def _say(word: str, style: str, message: Any) -> None:
    # Brackets in a message are no markup: they name the extra of a package, say.
    Console(stderr=True).print(Text(word, style=style), str(message), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Any]:
    """A bar for each stage of a long work; hands out what to report stages, steps done and steps in all to."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns += (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report
