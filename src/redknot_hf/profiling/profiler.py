"""`profile_heads`: from a model and some prompts to a profile of its KV heads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .drift import drift, measure_drift
from .head_profile import HeadProfile, Number, check_target
from .prompt import Prompt, as_prompts, fingerprint
from .watching import check_model, kv_shape

METHODS = ("drift",)
Report = Callable[[str, int, int], object]


def profile_heads(  # noqa: PLR0913 - every one is a choice of the caller
    model: PreTrainedModel,
    inputs: Any,
    *,
    budget: Number | None = None,
    global_ratio: Number | None = None,
    bytes_per_token: Number | None = None,
    windows: Sequence[int] = (128, 256, 512, 1024),
    sink: int = 4,
    method: str = "drift",
    report: Report | None = None,
) -> HeadProfile:
    """Measures what restricting each KV head of a model to a window costs.

    Args:
        model: Runs with `attn_implementation="redknot"`; unchanged afterwards.
        inputs: Prompts (`calibration_prompts` makes some), sequences of token ids, or a tensor with a prompt a row.
            Two at least, so that two halves can be compared.
        budget: Share of the dense cache's bytes that the plan may keep of the longest prompt.
        global_ratio: Or the share of its heads that are global.
        bytes_per_token: Or the bytes a token that it may keep. Without any of the three, `plan` of the profile asks.
        windows: Candidate windows of local heads, in tokens.
        sink: First tokens that local heads keep.
        method: `"drift"`: error of the head's output, one forward pass a prompt.
        report: Called with the name of a stage, steps done and steps in all.

    Raises:
        ValueError: The model cannot be profiled, a prompt is no longer than the widest window, a budget is impossible,
            or the model computes NaN.
    """
    check_model(model)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {METHODS}")
    windows = _windows(windows)
    bound = {"budget": budget, "global_ratio": global_ratio, "bytes_per_token": bytes_per_token}
    target = {name: value for name, value in bound.items() if value is not None}
    if target:
        check_target(target)
    prompts = as_prompts(inputs, windows, sink)
    if len(prompts) < 2:
        raise ValueError("there is 1 prompt: give two or more, so that the halves of the prompts can be compared")
    shape, token_bytes = kv_shape(model)
    start, done = time.perf_counter(), iter(range(1, len(prompts) + 1))
    sums = measure_drift(model, prompts, windows, sink, lambda: report and report("drift", next(done), len(prompts)))
    profile = HeadProfile(
        method=method, heads_by_layer=shape, windows=windows, sink=sink, errors=drift(sums),
        halves=(drift(sums[::2]), drift(sums[1::2])), length=max(map(len, prompts)), token_bytes=token_bytes,
        target=target, provenance=_provenance(model, prompts) | {"seconds": round(time.perf_counter() - start, 1)},
    )  # fmt: skip
    if target:
        profile.plan()
    return profile


def _windows(windows: Sequence[int]) -> tuple[int, ...]:
    if not windows or any(window < 1 for window in windows) or len(set(windows)) != len(windows):
        raise ValueError(f"windows={tuple(windows)}: give different numbers of tokens, such as (128, 512)")
    return tuple(sorted(windows))


def _provenance(model: PreTrainedModel, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What was measured, with what."""
    config = model.config
    kinds = sorted({prompt.kind for prompt in prompts})
    lengths = sorted({len(prompt) for prompt in prompts})
    return {
        "model": config.name_or_path or type(model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration": {
            "hash": fingerprint(prompts), "prompts": len(prompts), "lengths": lengths, "kinds": kinds,
            "scored": sum(len(prompt.targets) for prompt in prompts),
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
