"""What the parts of the serving benchmark share: a model with random weights, engines of it, prompts, and clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from evals.benchmarks.measured_model import MeasuredModel
from evals.benchmarks.served.work import Work
from redknot_hf import cache_argument
from redknot_hf.cache.span import Span
from redknot_hf.serving import Engine, Request, Sampling

PLAN = "1/8 global"
INT8 = "1/8 global in int8"
_READ = 8192  # tokens of a prompt that are read at once
# Parts of the names of kernels.
_KERNELS = {"attention": ("split_kernel", "merge_kernel", "cool"), "products": ("gemm", "gemv", "nvjet", "cutlass")}


class Scene(MeasuredModel):
    """A model, its plans, and what is asked of an engine."""

    def __init__(self, shape: str, longest: int, device: torch.device) -> None:
        super().__init__(shape, longest, device)
        self.plans[INT8] = self.plans[PLAN].stored("int8")

    def engine(self, work: Work, plan: str = PLAN, **options: Any) -> Engine:
        """One with room for the work; nothing is parked unless that is asked for."""
        self.collect()
        self.model.set_attn_implementation("redknot")
        sizes: dict[str, Any] = {
            "memory": work.memory, "max_batch": work.requests, "max_len": work.length + work.new, "chunk": _READ,
            "parked": 0,
        }  # fmt: skip
        return Engine(self.model, self.plans[plan], **sizes | options)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random ones."""
        return self.ids(count, length).tolist()

    @torch.no_grad()
    def beginning(self, length: int) -> tuple[list[int], Span]:
        """A prompt, and what a cache holds of it: read once, and put into each request's own pages by `source=`."""
        ids, cache = self.ids(1, length), self.cache(PLAN)
        for part in ids.split(_READ, 1):
            self.model(part, use_cache=True, logits_to_keep=1, **cache_argument(self.model, cache))
        return ids[0].tolist(), cache.spans()[0]

    def placed(self, engine: Engine, begun: tuple[list[int], Span], new: list[int]) -> list[Request]:
        """Requests whose prompt is what was read and one more token, each with its own, and with so many new ones."""
        ids, span = begun
        more = self.ids(1, len(new))[0].tolist()
        return [
            engine.submit([*ids, token], Sampling(max_new_tokens=n), source=lambda: span)
            for token, n in zip(more, new, strict=True)
        ]

    def mark(self) -> Any:
        """A moment of the device's, where it has any; `between` two it gives seconds."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def kernels(self, run: Callable[[], Any], times: int = 3) -> dict[str, float]:
        """Milliseconds of the device's kernels in what is run, by what they do, and how many there are.

        Of products of matrices, of attention with its merging, and of all else; empty on a CPU.
        """
        if self.device.type != "cuda":
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            for _ in range(times):
                run()
            self.wait()
        found = {"products_ms": 0.0, "attention_ms": 0.0, "other_ms": 0.0, "kernels": 0.0}
        for event in profile.key_averages():
            kind = next((kind for kind, names in _KERNELS.items() if any(x in event.key for x in names)), "other")
            found[f"{kind}_ms"] += event.self_device_time_total / 1e3 / times
            found["kernels"] += event.count / times
        return found

    def between(self, first: Any, last: Any) -> float:
        """Seconds; the device must have come to the last."""
        return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3


def until_all_decode(engine: Engine, asked: list[Request]) -> None:
    """Steps until each request has its first token.

    Raises:
        RuntimeError: One failed.
    """
    while not all(request.tokens for request in asked):
        engine.step()
        check(asked)


def check(asked: list[Request]) -> None:
    """Raises the error of a request that failed."""
    failed = next((request.error for request in asked if request.error), None)
    if failed is not None:
        raise RuntimeError(f"a request failed: {failed}") from failed


def bar(found: float, *, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    """A bar, and whether it is met."""
    limit = {"at_least": least} if most is None else {"at_most": most}
    met = (least is None or found >= least) and (most is None or found <= most)
    return {**limit, "found": float(f"{found:.4g}"), "met": met}
