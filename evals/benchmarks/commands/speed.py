"""Time and memory of a forward pass and of decoding, ours against DynamicCache, as ratios within one run.

    python -m evals bench speed --out evals/results/speed_cpu.jsonl

Prefill reads the whole prompt at once; decoding adds one token at a time through the model's forward, as `generate`
does. Runs of the methods take turns, and medians are compared, so that a slow minute of the machine hits all of them.
The last line is one JSON object; `--out` appends it to a file.
"""

from __future__ import annotations

from typing import Annotated

import typer

from evals.benchmarks.options import Decoded, Lengths, Out, command

MODELS = "bundled", "llama_1024"

app = command()


@app.command(help=__doc__)
def main(
    models: Annotated[list[str], typer.Option("--model", help=f"of {', '.join(MODELS)}")] = list(MODELS),
    lengths: Lengths = [1024, 8192],
    tokens: Decoded = 24,
    repeats: int = 7,
    out: Out = None,
) -> None:
    """Measures, prints a table, and appends a line to a file."""
    import torch

    from evals.benchmarks import speed
    from evals.result_file import write_line

    rows = []
    for name in models:
        model, plan = speed.MODELS[name]()
        model.eval()
        rows += [
            {"model": name, "length": n, "methods": speed.measure(model, plan, n, tokens, repeats)} for n in lengths
        ]
    print(speed.table(rows))
    write_line(out, {"benchmark": "speed", "rows": rows}, torch.device("cpu"))
