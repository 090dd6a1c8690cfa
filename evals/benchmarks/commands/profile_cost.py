"""What profiling a large model costs: seconds and peak memory, on Llama-3.1-8B's shape with random weights.

    python -m evals bench profile_cost --out evals/results/profile_cost.jsonl

Random weights cost what trained ones do, but for the rounds that the search of `loss` takes. It ends after
`--loss-seconds`: `passes` says how many forward passes it made, and `finished` whether it wanted no more.
`held_out_kl` compares the methods' plans, for what the heads of a random model are worth. It prints a JSON line a
method, and `--out` appends them to a file.
"""

from __future__ import annotations

from typing import Annotated

import typer

from evals.benchmarks.options import Out, Shape, command, place_of

app = command()


@app.command(help=__doc__)
def main(
    shape: Shape = "8b",
    methods: Annotated[list[str], typer.Option("--method", help="drift, mass, loss or gates")] = ["drift", "loss"],
    length: int = 8192,
    prompts: Annotated[int, typer.Option(help="every fourth is held out")] = 8,
    scored: Annotated[int, typer.Option(help="tokens of a prompt that are predicted")] = 64,
    windows: Annotated[list[int], typer.Option("--window")] = [128, 256, 512, 1024],
    storages: Annotated[list[str], typer.Option("--storage", help="heads may take too, by drift and loss")] = [],
    loss_seconds: Annotated[float, typer.Option(help="time for the search of loss, about")] = 600,
    out: Out = None,
) -> None:
    """Measures, and appends the lines to a file."""
    from evals.benchmarks.profile_cost import make_prompts, measure
    from evals.benchmarks.random_llama import random_llama
    from evals.result_file import write_line

    place = place_of(None)
    model = random_llama(shape, length + 64, place)
    texts = make_prompts(model.config.vocab_size, length, prompts, scored)
    # Kernels are compiled by a first, short run.
    measure(model, make_prompts(model.config.vocab_size, max(windows) + 64, 2, 8), "drift", windows, 0, storages)
    for method in methods:
        used = windows[-1:] if method == "gates" else windows
        found = measure(model, texts, method, used, loss_seconds, storages if method in ("drift", "loss") else [])
        write_line(out, {"benchmark": "profile_cost", "shape": shape, **found}, place)
