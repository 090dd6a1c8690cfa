"""Tokens a second of an engine whose model is shared by ranks: Llama-3.1-8B's shape with random weights.

    torchrun --nproc-per-node 2 -m evals bench ranks --out evals/results/ranks.jsonl
    python -m evals bench ranks --out evals/results/ranks.jsonl

The second line is the one device that the first is held against. All requests are handed in at once, and timed are the
steps in which all of them decode and none is read. Of the KV heads 1/8 are global, in an order in which ranks hold as
many bytes (`plan.balanced`). `pages_bytes` are those of one rank, and the bar is what two devices are to reach of one,
whose row is read from `--out`. The last line is JSON; `--out` appends it to a file.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import distributed
from transformers import AutoModelForCausalLM

from evals.benchmarks.options import DEVICE, Device, Out, Shape, command
from evals.benchmarks.random_llama import random_llama
from evals.result_file import write_line
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.parallel import reorder_heads
from redknot_hf.serving import Engine, Sampling

LOCAL = HeadSpec(window=256, sink=4)
BAR = 1.6  # times the tokens a second of one device

app = command()


def shared_model(shape: str, longest: int, device: torch.device, ranks: int) -> Any:
    """The model whole, or this rank's part of it: of ranks the first writes it to a folder, and all read theirs."""
    if ranks == 1:
        return random_llama(shape, longest, device)
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    folder = [tempfile.mkdtemp() if not distributed.get_rank() else ""]
    distributed.broadcast_object_list(folder, 0)
    if not distributed.get_rank():
        random_llama(shape, longest, device).save_pretrained(folder[0])
    distributed.barrier()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder[0], dtype="auto", tp_plan="auto", attn_implementation="redknot"
    )
    distributed.barrier()
    if not distributed.get_rank():
        shutil.rmtree(folder[0])
    return model.eval()


def decoded(engine: Engine, requests: int, length: int, new: int) -> dict[str, Any]:
    """Serves requests to their end, and says what steps took in which all of them decode and none is read.

    Raises:
        RuntimeError: A request failed.
    """
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(engine.words, (requests, length), generator=draw).tolist()
    asked = [engine.submit(ids, Sampling(new, ignore_eos=True)) for ids in texts]
    steps, start = [], time.perf_counter()
    while not engine.idle:
        read, decoded = engine.reader.read, engine.reader.decoded
        before = time.perf_counter()
        engine.step()
        if engine.reader.seats.device.type == "cuda":
            torch.cuda.synchronize()
        if engine.reader.read == read and engine.reader.decoded - decoded == requests:
            steps.append(time.perf_counter() - before)
    if failed := next((request.error for request in asked if request.error), None):
        raise RuntimeError(f"a request failed: {failed}") from failed
    step = statistics.median(steps)
    return {"step_ms": 1e3 * step, "steps": len(steps), "tokens_per_s": requests / step,
            "s": time.perf_counter() - start}  # fmt: skip


def against_one(out: Path | None, row: dict[str, Any]) -> dict[str, Any]:
    """The bar, where the file has a row of one device that did the same."""
    same = ("benchmark", "shape", "requests", "length", "new")
    lines = out.read_text().splitlines() if out and out.exists() else []
    alone = [x for x in map(json.loads, lines) if x["ranks"] == 1 and all(x[name] == row[name] for name in same)]
    if row["ranks"] == 1 or not alone:
        return {}
    found = row["tokens_per_s"] / alone[-1]["tokens_per_s"]
    return {"bars": {"times one device": {"found": found, "at_least": BAR, "met": found >= BAR}}}


@app.command(help=__doc__)
def main(
    shape: Shape = "8b",
    requests: Annotated[int, typer.Option(help="handed in at once")] = 32,
    length: Annotated[int, typer.Option(help="tokens of a prompt")] = 32768,
    new: Annotated[int, typer.Option(help="tokens of an answer")] = 128,
    memory: Annotated[str, typer.Option(help="pages of each rank")] = "40GiB",
    capture: Annotated[bool, typer.Option(help="steps as CUDA graphs")] = True,
    device: Device = DEVICE,
    out: Out = None,
) -> None:
    """Measures, and appends a line to a file."""
    place, ranks = torch.device(device), int(os.environ.get("WORLD_SIZE", 1))
    model = shared_model(shape, length + new + 64, place, ranks)
    heads = model.config.num_key_value_heads
    plan = HeadPlan.with_global(model.config, [(i, i % heads) for i in range(len(model.model.layers))], local=LOCAL)
    if ranks > 1:
        placement = plan.balanced(ranks, length, model.config)
        reorder_heads(model, placement)
        plan = placement.plan
    engine = Engine(
        model, plan, memory=memory, max_batch=requests, max_len=length + new, chunk=8192, parked=0, capture=capture
    )
    if not engine.ranks.leads:
        engine.follow()
        return
    row = {"benchmark": "ranks", "shape": shape, "ranks": ranks, "requests": requests, "length": length, "new": new}
    row |= {"captured": engine.reader.seats.captures, "pages_bytes": engine.memory.used()["total"]}
    row |= decoded(engine, requests, length, new)
    engine.shutdown()
    write_line(out, row | against_one(out, row), place)
