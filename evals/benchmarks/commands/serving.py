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
from importlib import import_module
from typing import Annotated

import typer

from evals.benchmarks.options import Device, Out, command, place_of
from evals.benchmarks.served.work import PARTS, WORKS

app = command()


@app.command(help=__doc__)
def main(
    shape: Annotated[str, typer.Option(help=f"of the random Llama: {', '.join(WORKS)}")] = "8b",
    parts: Annotated[list[str], typer.Option("--part", help=f"of {', '.join(PARTS)}")] = list(PARTS),
    device: Device = None,
    out: Out = None,
) -> None:
    """Measures, and appends lines to a file."""
    unknown = [name for name in parts if name not in PARTS]
    if shape not in WORKS or unknown:
        what = f"--part {unknown[0]}: give one of {', '.join(PARTS)}" if unknown else f"--shape {shape}"
        raise typer.BadParameter(what if unknown else f"{what}: give one of {', '.join(WORKS)}")
    from evals.benchmarks.served.scene import Scene
    from evals.result_file import write_line

    works, place = WORKS[shape], place_of(device)
    scene = Scene(shape, max(works[name].length + works[name].new for name in parts), place)
    for name in parts:
        start = time.perf_counter()
        measure = getattr(import_module(f"evals.benchmarks.served.{name}"), name)
        for row in measure(scene, works[name]):
            found = {"benchmark": "serving", "part": name, "shape": shape, **row}
            write_line(out, {**found, "part_s": round(time.perf_counter() - start, 1)}, place)
        scene.collect()
