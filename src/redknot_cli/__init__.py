"""The `redknot` command: what each of its words takes.

What a command does is imported when it runs. A package of its own, because importing `redknot_hf` imports torch and
transformers, and help should not wait for them.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .gate import gate
from .harness import bench, evaluate
from .plans import plans
from .profile import profile
from .serve import serve

__all__ = ["app"]

# Of a command whose words are those of another program.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version as version_of

        typer.echo(f"redknot-hf {version_of('redknot-hf')}")
        raise typer.Exit


@app.callback()
def redknot(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A head-aware KV cache: which heads of a model need everything, and what does it cost to give the others less?"""


app.command()(profile)
app.add_typer(plans, name="plan")
app.command("eval", context_settings=_PASSED_ON)(evaluate)
app.command()(gate)
app.command()(serve)
app.command(context_settings=_PASSED_ON)(bench)
