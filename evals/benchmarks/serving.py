"""Serving on one device, part by part: an engine of Llama-3.1-8B's shape with random weights, 1/8 of its heads global.

    python -m evals bench serving --out evals/results/serving.jsonl

decoding  all requests decode: tokens a second, against a captured static batch; and with the global heads in int8
arrivals  requests arrive and the device is full: steps against a roofline, sequences against a dense engine
peer      the same requests by transformers' `generate_batch`, over SDPA
host      what a step of 64 seats takes of the host, beside the replay of its graph
prefix    requests that begin alike: time to the first token, pages in memory
swap      a sequence goes to the host and comes back

Each row is printed, and appended to `--out`, as a line of JSON as soon as it is measured, with its bars. `--part` runs
some of them. The shape `toy` does a little of each on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer

from evals.benchmarks.options import DEVICE, Device, Out, command
from evals.benchmarks.served.arrivals import arrivals
from evals.benchmarks.served.decoding import decoding
from evals.benchmarks.served.host import host
from evals.benchmarks.served.peer import peer
from evals.benchmarks.served.prefix import prefix
from evals.benchmarks.served.scene import Scene, Work
from evals.benchmarks.served.swap import swap
from evals.result_file import write_line

PARTS: dict[str, Callable[[Scene, Work], Iterator[dict[str, Any]]]] = {
    "host": host, "prefix": prefix, "swap": swap, "arrivals": arrivals, "decoding": decoding, "peer": peer,
}  # fmt: skip
# Requests, tokens of a prompt and of an answer, pages.
WORKS = {
    "8b": {
        "host": Work(64, 512, 204, "8GiB"),
        "prefix": Work(32, 16384 + 64, 8, "24GiB"),
        "swap": Work(1, 32768, 60, "4GiB"),
        "arrivals": Work(64, 8192, 256, "11GiB"),
        "decoding": Work(32, 32768, 512, "24GiB"),
        "peer": Work(16, 2048, 64, "8GiB"),
    },
    "toy": {
        "host": Work(2, 70, 16, "8MiB"),
        "prefix": Work(2, 320 + 64, 2, "32MiB"),
        "swap": Work(1, 150, 12, "8MiB"),
        "arrivals": Work(2, 1300, 8, "3MiB"),
        "decoding": Work(2, 130, 18, "8MiB"),
        "peer": Work(2, 40, 4, "8MiB"),
    },
}

app = command()


@app.command(help=__doc__)
def main(
    shape: Annotated[str, typer.Option(help=f"of the random Llama: {', '.join(WORKS)}")] = "8b",
    parts: Annotated[list[str], typer.Option("--part", help=f"of {', '.join(PARTS)}")] = list(PARTS),
    device: Device = DEVICE,
    out: Out = None,
) -> None:
    """Measures, and appends lines to a file."""
    unknown = [name for name in parts if name not in PARTS]
    if shape not in WORKS or unknown:
        what = f"--part {unknown[0]}: give one of {', '.join(PARTS)}" if unknown else f"--shape {shape}"
        raise typer.BadParameter(what if unknown else f"{what}: give one of {', '.join(WORKS)}")
    works, place = WORKS[shape], torch.device(device)
    scene = Scene(shape, max(works[name].length + works[name].new for name in parts), place)
    for name in parts:
        start = time.perf_counter()
        for row in PARTS[name](scene, works[name]):
            found = {"benchmark": "serving", "part": name, "shape": shape, **row}
            write_line(out, {**found, "part_s": round(time.perf_counter() - start, 1)}, place)
        scene.collect()
