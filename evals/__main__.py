"""The command line of the evaluation: `python -m evals --help`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from evals.audit import AuditError
from evals.commands import app

# Modules of `evals.benchmarks.commands`; what each does is imported when it runs, so that help waits for nothing, and
# machines that measure have no more than a model needs.
BENCHMARKS = (
    "break_even",
    "budgets",
    "speed",
    "speed_gpu",
    "new_lengths",
    "profiling",
    "profile_cost",
    "ranks",
    "reuse",
    "reuse_gpu",
    "reuse_real",
    "serving",
    "storages",
)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; NAME --help tells more")],
) -> None:
    """Measure time, memory and quality with one of the benchmarks."""
    if name == "--help":  # behind a name it is the benchmark's
        print(ctx.get_help())
        raise typer.Exit
    if name not in BENCHMARKS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(BENCHMARKS)}")
    program = import_module(f"evals.benchmarks.commands.{name}").app
    if "--help" not in ctx.args:
        import_module("transformers.utils.logging").disable_progress_bar()
    program(ctx.args, prog_name=f"{ctx.command_path} {name}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def serve(ctx: typer.Context) -> None:
    """Put load on a server that speaks OpenAI's protocol: latency and throughput; `serve --help` tells more."""
    import_module("evals.load.command").app(ctx.args, prog_name=ctx.command_path)


def main(words: Sequence[str] | None = None, name: str = "python -m evals") -> None:
    """The command; what is wrong with what it was given is said in a line, without a traceback.

    Args:
        words: Behind the command's name; by default those of this process.
        name: Of the command, as its help says it.
    """
    try:
        app(words, prog_name=name)
    except ModuleNotFoundError as e:
        raise SystemExit(f"error: the harness needs {e.name}: pip install 'redknot-hf[evals]'") from e
    except (AuditError, ValueError, ImportError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
