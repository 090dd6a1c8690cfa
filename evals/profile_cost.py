"""What profiling a large model costs: seconds and peak memory, on Llama-3.1-8B's shape with random weights.

    python -m evals.profile_cost --out evals/results/profile_cost.jsonl

Random weights cost what trained ones do, but for the rounds that the search of `loss` takes. It ends after
`--loss-seconds`: `passes` says how many forward passes it made, and `finished` whether it wanted no more.
`held_out_kl` compares the methods' plans, for what the heads of a random model are worth. It prints a JSON line a
method, and `--out` appends them to a file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from evals.random_llama import SHAPES, random_llama
from evals.result_file import write_line
from redknot_hf.profiling import Prompt, profile_heads


def make_prompts(vocabulary: int, length: int, count: int, scored: int) -> list[Prompt]:
    """Random tokens, of which the last ones are scored."""
    generator = torch.Generator().manual_seed(0)
    flags = torch.arange(length) >= length - scored
    return [Prompt(torch.randint(vocabulary, (length,), generator=generator), flags) for _ in range(count)]


def measure(model: Any, prompts: list[Prompt], method: str, windows: list[int], seconds: float) -> dict[str, Any]:
    """Profiles once, and says what it took."""
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
            model, prompts, method=method, windows=windows, global_ratio=0.25, report=report,
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
        "prompts": len(prompts), "passes": passes, "given_seconds": seconds if method in ("loss", "gates") else None,
        "finished": profile.provenance.get("finished"), "held_out_kl": [row["kl"] for row in confirmed],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Runs the measurements that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--methods", nargs="+", choices=("drift", "mass", "loss", "gates"), default=["drift", "loss"])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=8, help="every fourth is held out")
    parser.add_argument("--scored", type=int, default=64, help="tokens of a prompt that are predicted")
    parser.add_argument("--windows", nargs="+", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--loss-seconds", type=float, default=600, help="time for the search of loss, about")
    parser.add_argument("--out", type=Path, help="file to append the JSON lines to")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_llama(args.shape, args.length + 64, device)
    prompts = make_prompts(model.config.vocab_size, args.length, args.prompts, args.scored)
    # Kernels are compiled by a first, short run.
    measure(model, make_prompts(model.config.vocab_size, max(args.windows) + 64, 2, 8), "drift", args.windows, 0)
    for method in args.methods:
        windows = args.windows[-1:] if method == "gates" else args.windows
        found = measure(model, prompts, method, windows, args.loss_seconds)
        write_line(args.out, {"benchmark": "profile_cost", "shape": args.shape, **found}, device)


if __name__ == "__main__":
    main()
