"""Time to the first token of a prompt of stored documents: Llama-3.1-8B's shape with random weights, one device.

    python -m evals bench reuse_gpu --out evals/results/reuse_gpu.jsonl

The prompt is `--segments` documents of `--tokens` tokens behind one token, and `--suffix` new tokens. Timed is what
happens from the prompt's arrival to the logits of its next token, with all documents in the device's memory, in the
host's (pinned), or in files (which the operating system may hold in memory); against reading everything with
transformers' DynamicCache and SDPA, with and without the first document cached, and with RedKnotCache. Methods take
turns and medians count. One more run of each is profiled: what its stages take on the host, and the kernels and copies
they start on the device (overlapping, so the sum exceeds the time). `--out` appends JSON lines.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from evals.benchmarks.options import Device, Out, Shape, command, place_of

PLACES = "device", "host", "disk"

app = command()


@app.command(help=__doc__)
def main(
    shape: Shape = "8b",
    segments: Annotated[int, typer.Option(help="documents")] = 8,
    tokens: Annotated[int, typer.Option(help="of a document")] = 4096,
    suffix: Annotated[int, typer.Option(help="new tokens")] = 128,
    boundaries: Annotated[list[float], typer.Option("--boundary", help="shares recomputed")] = [0.0, 0.05, 0.1, 0.2],
    shares: Annotated[list[float], typer.Option("--question", help="shares recomputed for the suffix")] = [0.15],
    places: Annotated[list[str], typer.Option("--place", help=f"of {', '.join(PLACES)}")] = list(PLACES),
    names: Annotated[list[str], typer.Option("--method", help="by name; all, unless said otherwise")] = [],
    repeats: Annotated[int, typer.Option(help="timed turns")] = 5,
    folder: Annotated[Path | None, typer.Option(help="where files are written, on the disk to be measured")] = None,
    device: Device = None,
    out: Out = None,
) -> None:
    """Measures, prints a table, and appends the records to a file."""
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel

    from evals.benchmarks.measured_model import MeasuredModel
    from evals.benchmarks.reuse_gpu import Prompt, measure, methods, table
    from evals.result_file import write_line

    torch.manual_seed(0)
    place = place_of(device)
    length = 1 + segments * tokens + suffix
    bench = MeasuredModel(shape, length, place)
    assert isinstance(bench.model, PreTrainedModel)
    prompt = Prompt(bench, segments, tokens, suffix)
    about = {
        "shape": shape, "segments": segments, "tokens": tokens, "suffix": suffix,
        "plan": f"1/{bench.model.config.num_key_value_heads} global, window 256, sink 4",
        "dtype": str(bench.model.dtype), "repeats": repeats,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory(dir=folder) as made:
        runs = methods(prompt, boundaries, shares, places, Path(made))
        runs = {name: run for name, run in runs.items() if not names or name in names}
        for name, one in measure(bench, runs, repeats):
            found[name] = one
            if "question" in name:  # the shares are upper bounds, and it has just run
                one["recomputed"] = prompt.recomputed / (length - suffix)
            write_line(out, {"method": name, **one, **about}, place)
    Console(width=180).print(table(found))
