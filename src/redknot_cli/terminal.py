"""What commands say on the terminal: errors and warnings in a line, plans, and bars."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

# Columns of a table that goes to a file or another program, which has no width of its own.
_FILE_COLUMNS = 160


def console(stderr: bool = False) -> Console:
    """The terminal, as wide as it is."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _FILE_COLUMNS)


def tell(line: str) -> None:
    """Prints a line, or several, as they are."""
    console().print(line, markup=False, highlight=False, soft_wrap=True)


def show(plan: Any) -> None:
    """Prints a plan and where it comes from."""
    tell(str(plan))
    for name, entry in plan.provenance.items():
        if name not in ("held_out", "overlap"):
            tell(f"{name}: {entry}")


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


def fail(error: BaseException) -> NoReturn:
    """Says in a line what ended a command that was under way, and ends it."""
    _say("error:", "red", error)
    raise typer.Exit(1) from error


def _warned(message: Warning | str, *_: Any) -> None:
    _say("warning:", "yellow", message)


def _say(word: str, style: str, message: Any) -> None:
    from rich.text import Text

    # Brackets in a message are no markup: they name the extra of a package, say.
    console(stderr=True).print(Text(word, style=style), str(message), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Any]:
    """A bar for each stage of a long work; hands out what to report stages, steps done and steps in all to."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns += (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report
