"""What profiling a large model costs: seconds and peak memory, on Llama-3.1-8B's shape with random weights.

    python -m evals bench profile_cost --out evals/results/profile_cost.jsonl

Random weights cost what trained ones do, but for the rounds that the search of `loss` takes. It ends after
`--loss-seconds`: `passes` says how many forward passes it made, and `finished` whether it wanted no more.
`held_out_kl` compares the methods' plans, for what the heads of a random model are worth. It prints a JSON line a
method, and `--out` appends them to a file.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from evals.benchmarks.options import Out, Shape, command
from evals.benchmarks.random_llama import random_llama
from evals.result_file import write_line
from redknot_hf.profiling import Prompt, profile_heads

app = command()


def make_prompts(vocabulary: int, length: int, count: int, scored: int) -> list[Prompt]:
    """Random tokens, of which the last ones are scored."""
    generator = torch.Generator().manual_seed(0)
    flags = torch.arange(length) >= length - scored
    return [Prompt(torch.randint(vocabulary, (length,), generator=generator), flags) for _ in range(count)]


def measure(
    model: Any, prompts: list[Prompt], method: str, windows: list[int], seconds: float, storages: list[str]
) -> dict[str, Any]:
    """Profiles once, and says what it took: for a ratio of global heads, or with storages for a budget of bytes."""
    on_gpu = model.device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    with Progress(transient=True) as bar:
        tasks: dict[str, Any] = {}
        passes = 0

        def report(stage: str, done: int, total: int | None) -> None:
            nonlocal passes
            passes = max(passes, done)
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        profile = profile_heads(
            model, prompts, method=method, windows=windows, report=report, storages=storages,
            budget=0.25 if storages else None, global_ratio=None if storages else 0.25,
            seconds=seconds if method in ("loss", "gates") else None,
        )  # fmt: skip
    if on_gpu:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    confirmed = profile.provenance.get("held_out", [])
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {
        "method": method, "seconds": round(taken, 2), "peak_bytes": peak, "peak_over_weights_bytes": peak - before,
        "heads": profile.plan().num_heads, "length": profile.length, "windows": list(profile.windows),
        "storages": storages, "prompts": len(prompts), "passes": passes,
        "given_seconds": seconds if method in ("loss", "gates") else None,
        "finished": profile.provenance.get("finished"), "held_out_kl": [row["kl"] for row in confirmed],
    }  # fmt: skip


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_llama(shape, length + 64, device)
    texts = make_prompts(model.config.vocab_size, length, prompts, scored)
    # Kernels are compiled by a first, short run.
    measure(model, make_prompts(model.config.vocab_size, max(windows) + 64, 2, 8), "drift", windows, 0, storages)
    for method in methods:
        used = windows[-1:] if method == "gates" else windows
        found = measure(model, texts, method, used, loss_seconds, storages if method in ("drift", "loss") else [])
        write_line(out, {"benchmark": "profile_cost", "shape": shape, **found}, device)
