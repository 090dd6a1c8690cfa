"""What a length that was never seen costs: Llama-3.1-8B's shape with random weights, one device.

    python -m evals bench new_lengths --out evals/results/new_lengths.jsonl

No two prompts are of one length, and libraries plan or compile for lengths: cuDNN plans attention for every shape,
Triton compiles for what is a constant. Timed is the first token of prompts of lengths that the process meets for the
first time, and of the same lengths again; then questions of new lengths, on a cache that holds 4096 tokens. Plans are
1/8 global, and one whose layers have 0 to 8 global heads, as profiles give them. The last line is JSON; `--out`
appends it to a file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from evals.benchmarks.measured_model import LOCAL, MeasuredModel
from evals.benchmarks.options import DEVICE, Device, Lengths, Out, Shape, command
from evals.result_file import write_line
from redknot_hf import HeadPlan, cache_argument

app = command()

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


@app.command(help=__doc__)
def main(
    shape: Shape = "8b",
    lengths: Lengths = [1024, 2048, 4096, 8192, 16384, 32768],
    longest: Annotated[int, typer.Option(help="tokens of a question")] = 96,
    device: Device = DEVICE,
    out: Out = None,
) -> None:
    """Measures, prints tables, and appends a line to a file."""
    place = torch.device(device)
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
