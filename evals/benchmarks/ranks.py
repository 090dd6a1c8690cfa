"""Tokens a second of an engine whose model is shared by ranks: Llama-3.1-8B's shape with random weights."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from evals.benchmarks.kernels import kernels_ms
from evals.benchmarks.random_llama import random_llama
from redknot_hf import HeadSpec
from redknot_hf.parallel import over_ranks
from redknot_hf.serving import Engine, Sampling

LOCAL = HeadSpec(window=256, sink=4)
TIMED = 6  # steps, after which one is profiled
BAR = 1.6  # times the tokens a second of one device


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
        folder[0], dtype="auto", attn_implementation="redknot", **over_ranks()
    )
    distributed.barrier()
    if not distributed.get_rank():
        shutil.rmtree(folder[0])
    return model.eval()


def decoded(engine: Engine, requests: int, length: int, new: int) -> dict[str, Any]:
    """Serves requests to their end, and says what steps took in which all of them decode and none is read.

    Raises:
        RuntimeError: A request failed, or there was no such step.
    """
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(engine.words, (requests, length), generator=draw).tolist()
    asked = [engine.submit(ids, Sampling(new, ignore_eos=True)) for ids in texts]
    device, steps, kernels, start = engine.reader.seats.device, [], {}, time.perf_counter()
    while not engine.idle:
        read, decoded = engine.reader.read, engine.reader.decoded
        if len(steps) >= TIMED and not kernels:
            kernels = kernels_ms(partial(step, engine, device), device)
            continue
        before = time.perf_counter()
        step(engine, device)
        if engine.reader.read == read and engine.reader.decoded - decoded == requests:
            steps.append(time.perf_counter() - before)
    if failed := next((request.error for request in asked if request.error), None):
        raise RuntimeError(f"a request failed: {failed}") from failed
    if not steps:
        raise RuntimeError(f"the first request had its {new} tokens before the last one was read: give a larger --new")
    median = statistics.median(steps)
    return {"step_ms": 1e3 * median, "steps": len(steps), "tokens_per_s": requests / median,
            "s": time.perf_counter() - start, "kernels_ms": kernels}  # fmt: skip


def step(engine: Engine, device: torch.device) -> None:
    """One step of the engine, to its end."""
    engine.step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def against_one(out: Path | None, row: dict[str, Any]) -> dict[str, Any]:
    """The bar, where the file has a row of one device that did the same."""
    same = ("benchmark", "shape", "requests", "length", "new")
    lines = out.read_text().splitlines() if out and out.exists() else []
    alone = [x for x in map(json.loads, lines) if x["ranks"] == 1 and all(x[name] == row[name] for name in same)]
    if row["ranks"] == 1 or not alone:
        return {}
    found = row["tokens_per_s"] / alone[-1]["tokens_per_s"]
    return {"bars": {"times one device": {"found": found, "at_least": BAR, "met": found >= BAR}}}
