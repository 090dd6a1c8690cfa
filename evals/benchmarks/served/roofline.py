"""The least time that steps of an engine take on a device: their bytes over its bandwidth, their work over its peak.

    a step = max(weights + keys and values of those that decode, over bandwidth; their FLOPs, over peak)
           + FLOPs of what is read of prompts, over peak

Bytes are those that must be read: weights without the table of embeddings, and of every head the keys and values that
its rule keeps. A prompt's work is two FLOPs a weight and token, of the head of the model for its last token alone, and
four a channel, query head and visible key. Bandwidth and peak are measured on the device.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from evals.benchmarks.measured_model import MeasuredModel
from evals.benchmarks.speed_gpu import reading_rate
from redknot_hf import HeadPlan


@dataclass(frozen=True)
class Roofline:
    """Of one model under a plan, on one device.

    Attributes:
        bandwidth: Bytes a second.
        peak: FLOPs a second of a product of matrices.
        weights: Bytes that a step reads of the model.
        token_flops: Of a token, without attention and the model's head.
        head_flops: Of the model's head for a token.
        channel: Bytes of keys and values of a token of one head.
        attended: FLOPs of one key for all query heads of a KV head.
        keeps: Tokens that each head of the model keeps at most; `None` keeps all.
    """

    bandwidth: float
    peak: float
    weights: int
    token_flops: int
    head_flops: int
    channel: int
    attended: int
    keeps: tuple[int | None, ...]

    @classmethod
    def of(cls, bench: MeasuredModel, plan: HeadPlan) -> Roofline:
        """Measures the device."""
        config, model = bench.model.config, bench.model
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        weights = sum(x.numel() for x in model.parameters()) - table.numel()
        dim, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        return cls(
            reading_rate(bench.device), matmul_rate(bench.device), weights * head.itemsize,
            2 * (weights - head.numel()), 2 * head.numel(), 2 * dim * head.itemsize, 4 * dim * group,
            tuple(None if x.window is None else x.window + x.sink for layer in plan for x in layer),
        )  # fmt: skip

    def kept(self, tokens: int) -> int:
        """Keys that all heads of the model keep of a sequence of so many tokens."""
        return sum(tokens if most is None else min(tokens, most) for most in self.keeps)

    def seen(self, first: int, last: int) -> float:
        """Keys that the queries from one position to before another see, in all heads."""
        found = 0.0
        for most in self.keeps:
            turn = (
                last if most is None else min(max(most, first), last)
            )  # from here on a head sees as many as it keeps
            found += (turn - first) * (first + 1 + turn) / 2 + (last - turn) * (most or 0)
        return found

    def step(self, decoding: list[int], reading: list[tuple[int, int]]) -> float:
        """Seconds of a step at least.

        Args:
            decoding: Tokens that each sequence holds which gets one more.
            reading: Of each chunk of a prompt the first position, and the one behind its last.
        """
        bound = 0.0
        if decoding:
            kept = sum(self.kept(tokens + 1) for tokens in decoding)
            work = len(decoding) * (self.token_flops + self.head_flops) + kept * self.attended
            bound = max((self.weights + kept * self.channel) / self.bandwidth, work / self.peak)
        for first, last in reading:
            work = (last - first) * self.token_flops + self.head_flops + self.seen(first, last) * self.attended
            bound += work / self.peak
        return bound

    def row(self) -> dict[str, Any]:
        """What of it was measured."""
        return {"read_bytes_per_s": self.bandwidth, "matmul_flops_per_s": self.peak, "weights_bytes": self.weights}


def matmul_rate(device: torch.device) -> float:
    """FLOPs a second of a large product of matrices, in the dtype that a model has there."""
    fast = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if fast else (256, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times: list[float] = []
    for _ in range(7):
        if fast:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            torch.matmul(a, b)
        if fast:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 4)
    return 2 * size**3 / statistics.median(times)
