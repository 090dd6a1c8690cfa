"""Options that the benchmarks share, so that one name means one thing in all of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evals.benchmarks.random_llama import SHAPES

if TYPE_CHECKING:
    import torch

TINY = Path(os.path.relpath(Path(__file__).parents[1] / "tiny"))  # so profiles name no folder of this machine
MODELS = {"bundled": TINY, "plain": TINY / "plain"}

Shape = Annotated[str, typer.Option(help=f"of the random Llama: {', '.join(SHAPES)}")]
Lengths = Annotated[list[int], typer.Option("--length", help="tokens; may be given several times")]
Decoded = Annotated[int, typer.Option(help="decoded tokens a run")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one")]
Out = Annotated[Path | None, typer.Option(help="file to append the JSON lines to")]


def command() -> typer.Typer:
    """A program of one command."""
    return typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None)


def place_of(device: str | None) -> torch.device:
    """The device that was named, or a GPU if there is one."""
    import torch

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
