"""What int8 and int4 cost in attention and in words: Gaussian data, the bundled model, and a real one.

    python -m evals.real fetch
    python -m evals bench storages --out evals/results/storages.jsonl

Every head sees everything, and is stored as a cache stores it: the first page and the hot tail as the model made them,
the pages between in fewer bits. `attention` is the error of what attention gives to the last half of the tokens, in
its norm, against full pages: on a model the median and the most over layers, each given the input that it has in full.
`kl` is that of the next token, in nats, where all layers are stored; `agree` is the share of tokens whose likeliest
next one is the same. A line of JSON each; `--out` appends them to a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evals.benchmarks.options import Device, Out, command, place_of
from evals.real.model import FOLDER

app = command()


@app.command(help=__doc__)
def main(
    out: Out = None,
    length: Annotated[int, typer.Option(help="tokens of a text")] = 4096,
    device: Device = None,
    real: Annotated[Path, typer.Option(help="folder of the real model; left out if it is not there")] = FOLDER,
) -> None:
    """Measure the errors of heads that are stored in int8 and int4."""
    from evals.benchmarks.storages import gaussian, of_model, texts
    from evals.result_file import write_line

    home = place_of(device)
    for dim in (64, 128):
        for storage, error in gaussian(dim, length, home).items():
            row = {"data": "Gaussian", "head_dim": dim, "length": length, "storage": storage, "attention": error}
            write_line(out, row, home)
    for name, model, ids in texts(length, real, home):
        for storage, errors in of_model(model, ids.to(home)).items():
            about = {"data": name, "dtype": str(model.dtype).removeprefix("torch."), "length": ids.shape[1]}
            write_line(out, {**about, "storage": storage, **errors}, home)
