"""A model's seconds and bytes with one cache or another."""

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from redknot_hf import HeadPlan, RedKnotCache, cache_argument, captured_decoding

# Tokens behind the longest prompt that a reserved cache of ours has room for: it is gone on with often.
ROOM = 512


class Clock(BaseStreamer):
    """Notes when `generate` hands tokens on; the first time is that of the prompt itself."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left over."""


class TimedModel:
    """One model, and the methods that read and decode with it.

    Args:
        model: A causal language model, on its device; what ends its texts is taken from its generation config.
        plans: Of our methods, by name.
        longest: Tokens of the longest prompt.
    """

    def __init__(self, model: Any, plans: Mapping[str, HeadPlan], longest: int) -> None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        self.model, self.plans, self.longest = model, dict(plans), longest
        self.device: torch.device = model.device

    def cache(self, method: str, slots: int | None = None) -> Any:
        """A fresh cache, the attention it needs set: `dynamic`, `static`, or a plan, growing or reserved."""
        kind, _, how = method.partition(", ")
        self.model.set_attn_implementation("sdpa" if kind in ("dynamic", "static") else "redknot")
        config, slots = self.model.config, slots or self.longest + ROOM
        if kind == "dynamic":
            return DynamicCache(config=config)
        if kind == "static":
            return StaticCache(config=config, max_cache_len=slots)
        return RedKnotCache(config, self.plans[kind], max_cache_len=slots if how else None)

    def run(self, cache: Any, ids: torch.Tensor, new: int, **options: Any) -> dict[str, float]:
        """Seconds to the first token and of each later one, and the most bytes held meanwhile."""
        clock = Clock()
        self.reset_peak()
        start = time.perf_counter()

        def note(ids: torch.Tensor, scores: Any) -> torch.Tensor:
            self.wait()  # `generate` waits right after, to see whether all sequences have ended
            clock.put(None)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        heard = {"stopping_criteria": [note]} if len(ids) > 1 else {"streamer": clock}  # which takes one sequence
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            **cache_argument(self.model, cache), **heard, **options,
        )  # fmt: skip
        self.wait()
        first, *times = clock.times[1:] if len(ids) == 1 else clock.times
        steps = [b - a for a, b in zip([first, *times], times, strict=False)]
        return {"first_s": first - start, "token_s": statistics.median(steps[len(steps) // 4 :]), "peak": self.peak()}

    def captured(self, cache: Any, ids: torch.Tensor, new: int) -> tuple[float, torch.Tensor]:
        """Seconds that new tokens take by `captured_decoding`, and all tokens."""
        self.wait()
        start = time.perf_counter()
        ids = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            custom_generate=captured_decoding, **cache_argument(self.model, cache),
        )  # fmt: skip
        self.wait()
        return time.perf_counter() - start, ids

    def captured_token(self, cache: Any, ids: torch.Tensor, turns: int = 5, more: int = 64) -> float:
        """Seconds of a token that goes on: what many take longer than few, since both are captured first.

        The median of several turns: capturing takes longer at one time than at another.
        """
        seconds = []
        for _ in range(turns):
            short, ids = self.captured(cache, ids, 8)
            long, ids = self.captured(cache, ids, 8 + more)
            seconds.append((long - short) / more)
        return statistics.median(seconds)

    def ids(self, batch: int, length: int) -> torch.Tensor:
        """Random tokens."""
        return torch.randint(self.model.config.vocab_size, (batch, length), device=self.device)

    def reserve(self, cache: Any, ids: torch.Tensor) -> int:
        """Lets a reserved cache take its memory, and says how much is held then in all."""
        with torch.no_grad():
            self.model(ids[:, :128], logits_to_keep=1, **cache_argument(self.model, cache))
        cache.reset()
        return self.held()

    def forget(self, cache: Any) -> None:
        """Frees what a method has left behind, compiled code too."""
        for layer in cache.layers:
            vars(layer).clear()
        torch._dynamo.reset()
        self.collect()

    def collect(self) -> None:
        """Frees what nothing holds any more, where bytes are told."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def held(self) -> int:
        self.wait()
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
