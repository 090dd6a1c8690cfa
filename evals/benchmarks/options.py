"""Options that the benchmarks share, so that one name means one thing in all of them."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from evals.benchmarks.random_llama import SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Shape = Annotated[str, typer.Option(help=f"of the random Llama: {', '.join(SHAPES)}")]
Lengths = Annotated[list[int], typer.Option("--length", help="tokens; may be given several times")]
Decoded = Annotated[int, typer.Option(help="decoded tokens a run")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Out = Annotated[Path | None, typer.Option(help="file to append the JSON lines to")]


def command() -> typer.Typer:
    """A program of one command."""
    return typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None)
