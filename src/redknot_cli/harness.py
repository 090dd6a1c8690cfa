"""`redknot eval` and `redknot bench`: the commands of the harness, the package `evals`.

Others have a package of that name. So the wheel holds it within `redknot_hf`, where only these commands look; in a
checkout it is a folder beside `src`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import typer

from .terminal import told

# Where the wheel has it.
_SHIPPED = Path(__file__).parents[1] / "redknot_hf" / "harness"


def evaluate(ctx: typer.Context) -> None:
    """Ask a model tasks with a plan and with other methods: run, report, frontier, gate, tasks."""
    _pass_on(ctx.args or ["--help"], "redknot eval")


def bench(ctx: typer.Context) -> None:
    """Measure time, memory and quality: `redknot bench speed --help`, and others."""
    _pass_on(["bench", *(ctx.args or ["--help"])], "redknot")


def _pass_on(words: Sequence[str], name: str) -> None:
    """Runs the harness with these words.

    Raises:
        ImportError: It is not installed, or another package has its name.
    """
    sys.path[:0] = [str(_SHIPPED)] if _SHIPPED.is_dir() else []
    sys.path += [] if "" in sys.path else [""]  # methods of one's own, as `python -m` finds them
    with told():
        found = find_spec("evals")
        if found is None or find_spec("evals.fidelity_gate") is None:
            where = f"at {found.origin} is another package" if found else "is not there"
            raise ImportError(f"the harness, a package of the name evals, {where}: install redknot-hf in a fresh "
                              "environment, or run in a checkout's root")  # fmt: skip
        import_module("evals.__main__").main(words, name)
