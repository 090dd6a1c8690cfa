"""From which bandwidth on fetching a context's KV takes less time than reading the context again, dense and planned.

    python -m evals bench break_even --out evals/results/break_even.jsonl

A context of Llama-3.1-8B's shape with random weights is read under a plan that keeps everything and under one of 1/8
global heads. What each cache then holds is fetched over TCP on the loopback, sent no faster than a given rate, and put
into another cache, which is checked to hold the same. Both are timed (medians); `break_even_mb_per_s` is the rate at
which the bytes alone would take as long as reading. What else the host does slows both: `load_average` is how many
processes ran or waited in the last minute, before and after. The last line is JSON; `--out` appends it to a file.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from evals.benchmarks.options import Device, Out, Shape, command, place_of

app = command()


@app.command(help=__doc__)
def main(
    shape: Shape = "8b",
    length: Annotated[int, typer.Option(help="tokens of the context")] = 32768,
    rates: Annotated[list[float], typer.Option("--rate", help="MB a second; several")] = [300.0, 1250.0, 5000.0],
    runs: Annotated[int, typer.Option(min=1, help="of each; the median counts")] = 3,
    device: Device = None,
    out: Out = None,
) -> None:
    """Measures, and appends a line to a file."""
    if min(rates) <= 0:
        raise typer.BadParameter(f"--rate {min(rates)}: give MB a second")
    from evals.benchmarks.break_even import compare
    from evals.benchmarks.measured_model import MeasuredModel
    from evals.result_file import write_line

    place, load = place_of(device), [os.getloadavg()[0]]
    bench = MeasuredModel(shape, length, place)
    rows = [compare(bench, kind, length, rates, runs) for kind in ("dense", "planned")]
    load.append(os.getloadavg()[0])
    write_line(out, {"benchmark": "break_even", "shape": shape, "rows": rows}, place, load_average=load)
