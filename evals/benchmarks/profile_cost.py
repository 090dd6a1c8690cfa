"""What profiling a large model costs: seconds and peak memory, on Llama-3.1-8B's shape with random weights."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.progress import Progress

from redknot_hf.profiling import Prompt, profile_heads


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
