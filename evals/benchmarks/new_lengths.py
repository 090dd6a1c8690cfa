"""What a length that was never seen costs: Llama-3.1-8B's shape with random weights, one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from evals.benchmarks.measured_model import LOCAL, MeasuredModel
from redknot_hf import HeadPlan, cache_argument

METHODS = "dynamic", "1/8 global", "uneven"
# Tokens of the cache that questions are put to.
CONTEXT = 4096


def read(bench: MeasuredModel, cache: Any, tokens: int) -> float:
    """Seconds until a cache has taken some tokens and the next one's logits are there."""
    ids = bench.ids(1, tokens)
    bench.wait()
    start = time.perf_counter()
    with torch.inference_mode():
        bench.model(input_ids=ids, logits_to_keep=1, **cache_argument(bench.model, cache))
    bench.wait()
    return time.perf_counter() - start


def prompts(bench: MeasuredModel, method: str, length: int, new: Sequence[int]) -> dict[str, Any]:
    """Seconds to the first token of prompts a little shorter than `length`: as new ones, and once more."""
    read(bench, bench.cache(method), length)  # what any prompt of the kind compiles
    first, again = ([read(bench, bench.cache(method), length - n) for n in new] for _ in range(2))
    return {"method": method, "length": length, "new_s": statistics.median(first), "s": statistics.median(again)}


def questions(bench: MeasuredModel, method: str, longest: int) -> dict[str, Any]:
    """Seconds of questions of every length in turn, each new, behind one context."""
    cache = bench.cache(method)
    read(bench, cache, CONTEXT)
    times = [read(bench, cache, n) for n in track(range(1, longest + 1), description=f"questions, {method}")]
    slow = 5 * statistics.median(times)
    return {
        "method": method, "longest": longest, "s": statistics.median(times), "total_s": sum(times),
        "slow": [n for n, seconds in enumerate(times, 1) if seconds > slow],
    }  # fmt: skip


def uneven(config: Any) -> HeadPlan:
    """A plan in which layers have every number of global heads."""
    heads = config.num_key_value_heads
    counts = [5 * layer % (heads + 1) for layer in range(config.num_hidden_layers)]
    chosen = [(layer, head) for layer, count in enumerate(counts) for head in range(count)]
    return HeadPlan.with_global(config, chosen, local=LOCAL)


def tables(found: dict[str, list[dict[str, Any]]]) -> list[Table]:
    """What was found, for people."""
    first = Table("method", "tokens", "new, ms", "again, ms", title="first token of prompts of new and known lengths")
    for row in found["prompts"]:
        first.add_row(row["method"], str(row["length"]), f"{1e3 * row['new_s']:.0f}", f"{1e3 * row['s']:.0f}")
    second = Table("method", "median, ms", "all, s", "slow", title=f"questions of new lengths behind {CONTEXT} tokens")
    for row in found["questions"]:
        second.add_row(row["method"], f"{1e3 * row['s']:.0f}", f"{row['total_s']:.1f}", str(row["slow"]))
    return [first, second]
