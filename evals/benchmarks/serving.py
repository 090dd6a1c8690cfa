"""Tokens a second of the engine: requests of one length, Llama-3.1-8B's shape with random weights, one device.

    python -m evals bench serving --out evals/results/serving.jsonl

All requests are handed in at once; an engine reads their prompts in chunks beside what decodes already. Timed is every
step, the device waited for: `step_ms` is the median of those in which all requests decode and nothing is read. The
last line is JSON; `--out` appends it to a file.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import typer

from evals.benchmarks.measured_model import MeasuredModel
from evals.benchmarks.options import DEVICE, Device, Out, Shape, command
from evals.result_file import write_line
from redknot_hf.serving import Engine, Sampling

app = command()


def decode_together(bench: MeasuredModel, requests: int, length: int, new: int, memory: str) -> dict[str, Any]:
    """Serves requests to their end, and says what steps took in which all of them decode.

    Raises:
        RuntimeError: A request failed.
    """
    bench.model.set_attn_implementation("redknot")
    engine = Engine(
        bench.model, bench.plans["1/8 global"], memory=memory, max_batch=requests, max_len=length + new, chunk=8192,
        parked=0,
    )  # fmt: skip
    asked = [engine.submit(ids, Sampling(max_new_tokens=new)) for ids in bench.ids(requests, length).tolist()]
    bench.wait()
    start = time.perf_counter()
    times, tokens = [start], [0]
    while not engine.idle:
        engine.step()
        bench.wait()
        times.append(time.perf_counter())
        tokens.append(sum(len(request.ids) for request in asked))
    if failed := next((request.error for request in asked if request.error), None):
        raise RuntimeError(f"a request failed: {failed}") from failed
    gained = zip(times, times[1:], tokens, tokens[1:], strict=False)
    read = requests  # tokens that the prompts themselves give
    together = [after - before for before, after, had, has in gained if has - had == requests and had >= read]
    step = statistics.median(together)
    return {
        "requests": requests, "length": length, "new": new, "step_ms": 1e3 * step, "steps": len(together),
        "tokens_per_s": requests / step, "s": times[-1] - start, "pages_bytes": engine.memory.used()["total"],
    }  # fmt: skip


@app.command(help=__doc__)
def main(
    shape: Shape = "8b",
    requests: Annotated[int, typer.Option(help="handed in at once")] = 32,
    length: Annotated[int, typer.Option(help="tokens of a prompt")] = 8192,
    new: Annotated[int, typer.Option(help="tokens of an answer")] = 192,
    memory: Annotated[str, typer.Option(help="pages of the engine")] = "24GiB",
    device: Device = DEVICE,
    out: Out = None,
) -> None:
    """Measures, and appends a line to a file."""
    place = torch.device(device)
    bench = MeasuredModel(shape, length + new, place)
    row = decode_together(bench, requests, length, new, memory)
    write_line(out, {"benchmark": "serving", "shape": shape, "rows": [row]}, place)
