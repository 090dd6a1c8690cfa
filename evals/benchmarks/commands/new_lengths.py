"""What a length that was never seen costs: Llama-3.1-8B's shape with random weights, one device.

    python -m evals bench new_lengths --out evals/results/new_lengths.jsonl

No two prompts are of one length, and libraries plan or compile for lengths: cuDNN plans attention for every shape,
Triton compiles for what is a constant. Timed is the first token of prompts of lengths that the process meets for the
first time, and of the same lengths again; then questions of new lengths, on a cache that holds 4096 tokens. Plans are
1/8 global, and one whose layers have 0 to 8 global heads, as profiles give them. The last line is JSON; `--out`
appends it to a file.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from evals.benchmarks.options import Device, Lengths, Out, Shape, command, place_of

app = command()


@app.command(help=__doc__)
def main(
    shape: Shape = "8b",
    lengths: Lengths = [1024, 2048, 4096, 8192, 16384, 32768],
    longest: Annotated[int, typer.Option(help="tokens of a question")] = 96,
    device: Device = None,
    out: Out = None,
) -> None:
    """Measures, prints tables, and appends a line to a file."""
    from rich.console import Console
    from rich.progress import track

    from evals.benchmarks.measured_model import MeasuredModel
    from evals.benchmarks.new_lengths import CONTEXT, METHODS, prompts, questions, tables, uneven
    from evals.result_file import write_line

    place = place_of(device)
    bench = MeasuredModel(shape, max(*lengths, CONTEXT + sum(range(longest + 1))), place)
    bench.plans["uneven"] = uneven(bench.model.config)
    # Each method at lengths of its own: a plan of one would serve another.
    found: dict[str, list[dict[str, Any]]] = {"prompts": [], "questions": []}
    for length in track(lengths, description="prompts"):
        for i, method in enumerate(METHODS):
            found["prompts"].append(prompts(bench, method, length, [10 * i + n for n in (1, 2, 3)]))
    found["questions"] = [questions(bench, method, longest) for method in METHODS]
    Console(width=120).print(*tables(found))
    write_line(out, {"benchmark": "new_lengths", "shape": shape, **found}, place)
