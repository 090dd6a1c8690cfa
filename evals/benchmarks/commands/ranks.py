"""Tokens a second of an engine whose model is shared by ranks: Llama-3.1-8B's shape with random weights.

    torchrun --nproc-per-node 2 -m evals bench ranks --out evals/results/ranks.jsonl
    python -m evals bench ranks --out evals/results/ranks.jsonl

The second line is the one device that the first is held against. All requests are handed in at once, and timed are the
steps in which all of them decode and none is read. Of the KV heads 1/8 are global, in an order in which ranks hold as
many bytes (`plan.balanced`). `pages_bytes` are those of one rank, and the bar is what two devices are to reach of one,
whose row is read from `--out`. `kernels_ms` says what the first rank spends of such a step in which kernels (`""`: in
all; they may overlap), in one that is not timed. The last line is JSON; `--out` appends it to a file.
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
    requests: Annotated[int, typer.Option(help="handed in at once")] = 32,
    length: Annotated[int, typer.Option(help="tokens of a prompt")] = 32768,
    new: Annotated[int, typer.Option(help="tokens of an answer, more than there are chunks to read")] = 192,
    memory: Annotated[str, typer.Option(help="pages of each rank")] = "40GiB",
    capture: Annotated[bool, typer.Option(help="steps as CUDA graphs")] = True,
    compiled: Annotated[bool, typer.Option(help="captured steps are compiled before")] = False,
    device: Device = None,
    out: Out = None,
) -> None:
    """Measures, and appends a line to a file."""
    from torch import distributed

    from evals.benchmarks.ranks import LOCAL, against_one, decoded, shared_model
    from evals.result_file import write_line
    from redknot_hf import HeadPlan
    from redknot_hf.parallel import reorder_heads
    from redknot_hf.serving import Engine

    place, ranks = place_of(device), int(os.environ.get("WORLD_SIZE", 1))
    model = shared_model(shape, length + new + 64, place, ranks)
    heads = model.config.num_key_value_heads
    plan = HeadPlan.with_global(model.config, [(i, i % heads) for i in range(len(model.model.layers))], local=LOCAL)
    if ranks > 1:
        placement = plan.balanced(ranks, length, model.config)
        reorder_heads(model, placement)
        plan = placement.plan
    engine = Engine(
        model, plan, memory=memory, max_batch=requests, max_len=length + new, chunk=8192, parked=0, capture=capture,
        compiled=compiled,
    )  # fmt: skip
    if not engine.ranks.leads:
        engine.follow()
        distributed.destroy_process_group()
        return
    row = {"benchmark": "ranks", "shape": shape, "ranks": ranks, "requests": requests, "length": length, "new": new}
    row |= {
        "captured": engine.reader.seats.captures,
        "compiled": compiled,
        "pages_bytes": engine.memory.used()["total"],
    }
    row |= decoded(engine, requests, length, new)
    engine.shutdown()
    if ranks > 1:
        distributed.destroy_process_group()
    write_line(out, row | against_one(out, row), place)
