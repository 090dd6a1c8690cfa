"""Time to the first token of a prompt of stored documents: Llama-3.1-8B's shape with random weights, one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import DynamicCache

from evals.benchmarks.measured_model import MeasuredModel
from redknot_hf import RedKnotCache, SegmentRef, SegmentStore, assemble, cache_argument

Run = Callable[[], Any]
STAGES = ("fetch", "angles", "splice", "boundary", "suffix")
PLACES = {
    "device": {"device_bytes": None, "host_bytes": 0},
    "host": {"device_bytes": 0, "host_bytes": None},
    "disk": {"device_bytes": 0, "host_bytes": 0},
}


class Prompt:
    """Documents, a suffix, and ways to read them.

    Args:
        model: Runs with `"redknot"` or `"sdpa"`.
        bench: Makes caches, and knows the plan.
        segments, tokens, suffix: How many documents, of how many tokens, and how many new ones follow.
    """

    def __init__(self, bench: MeasuredModel, segments: int, tokens: int, suffix: int) -> None:
        self.bench, self.model = bench, bench.model
        self.plan = bench.plans["1/8 global"]
        generator = torch.Generator().manual_seed(0)
        draw = lambda n: torch.randint(2, self.model.config.vocab_size, (n,), generator=generator).tolist()  # noqa: E731
        self.bos, self.documents = [1], [draw(tokens) for _ in range(segments)]
        # Words of the documents, so that a question finds some in them.
        every = torch.randint(segments * tokens, (suffix,), generator=generator).tolist()
        self.suffix = [self.documents[i // tokens][i % tokens] for i in every]
        self.first: Any = None
        self.recomputed = 0

    @property
    def ids(self) -> list[int]:
        return [*self.bos, *(token for document in self.documents for token in document), *self.suffix]

    def read(self, cache: Any, ids: Sequence[int]) -> Any:
        """Runs tokens through the model; returns the logits behind the last, and the cache keeps them."""
        with record_function("redknot: suffix"), torch.inference_mode():
            tensor = torch.tensor([ids], device=self.bench.device)
            return self.model(input_ids=tensor, logits_to_keep=1, **cache_argument(self.model, cache)).logits

    def dense(self) -> Any:
        self.model.set_attn_implementation("sdpa")
        return self.read(DynamicCache(config=self.model.config), self.ids)

    def dense_with_first(self) -> Any:
        """As a prefix cache does it: the first document's keys and values are there."""
        self.model.set_attn_implementation("sdpa")
        known = [*self.bos, *self.documents[0]]
        if self.first is None:
            self.first = DynamicCache(config=self.model.config)
            self.read(self.first, known)
        fork = copy(self.first)  # layers replace their tensors and do not write to them, so forks may share them
        fork.layers = [copy(layer) for layer in self.first.layers]
        return self.read(fork, self.ids[len(known) :])

    def whole(self) -> Any:
        self.model.set_attn_implementation("redknot")
        return self.read(RedKnotCache(self.model.config, self.plan), self.ids)

    def reuse(self, refs: list[SegmentRef], boundary: Any) -> Any:
        self.model.set_attn_implementation("redknot")
        return self.read(assemble(self.model, refs, boundary=boundary), self.suffix)

    def asked(self, refs: list[SegmentRef], share: float) -> Any:
        self.model.set_attn_implementation("redknot")
        cache = assemble(self.model, refs, question=self.suffix, share=share)
        self.recomputed = cache.recomputed_tokens
        return self.read(cache, self.suffix)

    def stored(self, place: str, folder: Path, keep: str = "plan") -> list[SegmentRef]:
        """The documents in a store that holds them in one place."""
        self.model.set_attn_implementation("redknot")
        path = folder if place == "disk" else None
        store = SegmentStore(self.model, self.plan, identity="random", path=path, keep=keep, **PLACES[place])
        store.verdict()
        # One by one: a batch needs more memory.
        return [store.add(self.bos), *(store.add(document, self.bos) for document in self.documents)]


def methods(
    prompt: Prompt, boundaries: Sequence[float], shares: Sequence[float], places: Sequence[str], folder: Path
) -> dict[str, Run]:
    """All methods by name; documents are stored on the way."""
    found: dict[str, Run] = {
        "dense": prompt.dense,
        "dense, first document cached": prompt.dense_with_first,
        "redknot, nothing stored": prompt.whole,
    }
    for place in places:
        start = time.perf_counter()
        refs = prompt.stored(place, folder)
        print(f"documents stored ({place}) in {time.perf_counter() - start:.1f} s", flush=True)
        for boundary in boundaries:
            found[f"reuse from {place}, boundary {boundary:.0%}"] = lambda r=refs, b=boundary: prompt.reuse(r, b)
        whole = prompt.stored(place, folder, "full") if shares else []
        for share in shares:
            found[f"reuse from {place}, all kept, question {share:.0%}"] = lambda r=whole, s=share: prompt.asked(r, s)
    return found


def measure(bench: MeasuredModel, runs: dict[str, Run], repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Median seconds of each method, of turns after the first, and what its stages take; one by one."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in track(range(repeats + 1), description="turns"):
        for name, run in runs.items():
            bench.wait()
            start = time.perf_counter()
            run()
            bench.wait()
            if turn:
                times[name].append(time.perf_counter() - start)
    for name, run in runs.items():
        yield name, {"first_token_s": statistics.median(times[name]), "all_s": times[name], **stages(bench, run)}


def stages(bench: MeasuredModel, run: Run) -> dict[str, Any]:
    """Milliseconds of each stage on the host and on the device, and of copies from host to device."""
    on_device = [ProfilerActivity.CUDA] if bench.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_device], acc_events=True) as profiled:
        run()
        bench.wait()
    host, device = (dict.fromkeys((*STAGES, "assembly"), 0.0) for _ in range(2))
    copies = 0.0
    for event in profiled.key_averages():
        name = event.key.removeprefix("redknot: ")
        if name in host:
            host[name] += event.cpu_time_total / 1e3
            device[name] = max(device[name], event.device_time_total / 1e3)
        elif "Memcpy HtoD" in event.key:
            copies += event.device_time_total / 1e3
    for found in (host, device):  # what is spliced is spliced within the pass of the boundaries
        found["boundary"] = max(found.pop("assembly") - found["splice"], 0.0)
    return {"host_ms": host, "device_ms": device, "copies_to_device_ms": copies}


def table(found: dict[str, dict[str, Any]]) -> Table:
    """The results, for people."""
    made = Table("method", title="time to the first token")
    for name in ("seconds", "dense / it", *(f"{stage}, host ms" for stage in STAGES), "copies, ms"):
        made.add_column(name, justify="right")
    dense = found["dense"]["first_token_s"] if "dense" in found else None
    for name, one in found.items():
        seconds = one["first_token_s"]
        ratio = f"{dense / seconds:.2f}" if dense else ""
        made.add_row(
            name, f"{seconds:.3f}", ratio, *(f"{one['host_ms'][s]:.1f}" for s in STAGES),
            f"{one['copies_to_device_ms']:.1f}",
        )  # fmt: skip
    return made
