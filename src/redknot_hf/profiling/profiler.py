"""`profile_heads`: from a model and some prompts to a profile of its KV heads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from transformers import PreTrainedModel

from redknot_hf.attention.watching import check_model, kv_shape
from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.plan import HeadSpec

from .drift import drift, measure_drift
from .fidelity import fidelity
from .gates import train_gates
from .head_profile import HeadProfile, Number, check_target
from .loss import LossSearch
from .mass import measure_mass
from .prompt import Prompt, as_prompts, fingerprint

METHODS = ("drift", "loss", "mass", "gates")
# Name of a stage, steps done, and steps in all where that is known.
Report = Callable[[str, int, int | None], object]
Table = Float[np.ndarray, "heads windows"]


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
    held_out: Any = None,
    seconds: Number | None = None,
    steps: int = 100,
    checkpoint: AnyPath | None = None,
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
        method: `"drift"`: error of the head's output, one forward pass a prompt. `"loss"`: KL divergence of the
            predictions, found by a search that restricts heads together; hundreds of forward passes. `"mass"`:
            attention outside of the window, the paper's criterion. `"gates"`: gates between full and windowed output,
            trained by distillation; one window.
        held_out: Prompts like `inputs`, of any lengths, on which the plan for the budget is confirmed. By default
            every fourth of four or more inputs is held out; they have no part in the profile.
        seconds: Time for the search of `"loss"` or the training of `"gates"`, about; less makes a rougher profile, and
            `finished` in the provenance of `"loss"` says whether it was enough.
        steps: Training steps of `"gates"`, of one prompt each, for each half of the prompts.
        checkpoint: File that the training of `"gates"` is kept in, and goes on from.
        report: Called with the name of a stage, steps done and steps in all, `None` if unknown.

    Raises:
        ValueError: The model cannot be profiled, a prompt is no longer than the widest window, a budget is impossible,
            or the model computes NaN.
    """
    check_model(model)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {METHODS}")
    windows = _windows(windows)
    if method == "gates" and len(windows) > 1:
        raise ValueError(f"windows={windows}: gates are trained for one window, such as windows=(256,)")
    bound = {"budget": budget, "global_ratio": global_ratio, "bytes_per_token": bytes_per_token}
    target = {name: value for name, value in bound.items() if value is not None}
    if target:
        check_target(target)
    prompts, confirming = _split(as_prompts(inputs, windows, sink), held_out, windows, sink)
    report = report or (lambda stage, done, total: None)
    start = time.perf_counter()
    shape, token_bytes = kv_shape(model)
    blank = np.zeros((sum(shape), len(windows)))
    profile = HeadProfile(
        method=method, heads_by_layer=shape, windows=windows, sink=sink, errors=blank, halves=(blank, blank),
        length=max(map(len, prompts)), token_bytes=token_bytes, target=target,
    )  # fmt: skip
    if target:
        profile.plan()  # an impossible budget is told before the work
    if method == "gates":
        ticks, tick = count(1), lambda: report("gates", next(ticks), 2 * steps)
        spec = HeadSpec(max(windows), sink)
        gates = train_gates(model, prompts, spec, steps, tick, seconds=seconds, path=checkpoint)
        first, second = (half[:, None] for half in gates)
        profile = replace(profile, errors=(first + second) / 2, halves=(first, second))
    else:
        profile = _measured(profile, model, prompts, seconds, report)
    provenance = {**_provenance(model, prompts), **profile.provenance}
    if target:
        provenance["overlap"] = round(profile.overlap(), 4)
        if confirming:
            report("held out", 0, None)
        provenance["held_out"] = fidelity(model, profile.plan(), confirming)
    return replace(profile, provenance=provenance | {"seconds": round(time.perf_counter() - start, 1)})


def _measured(
    profile: HeadProfile, model: PreTrainedModel, prompts: Sequence[Prompt], seconds: Number | None, report: Report
) -> HeadProfile:
    """The profile with its errors, by its method."""
    steps = count(1)
    tick = lambda: report(profile.method, next(steps), len(prompts))  # noqa: E731
    windows, sink = profile.windows, profile.sink
    if profile.method == "drift":
        sums = measure_drift(model, prompts, windows, sink, tick)
        return replace(profile, errors=drift(sums), halves=(drift(sums[::2]), drift(sums[1::2])))
    if profile.method == "mass":
        mass = measure_mass(model, prompts, windows, sink, tick)
        return replace(profile, errors=mass.mean(0), halves=(mass[::2].mean(0), mass[1::2].mean(0)))
    search = LossSearch(model, prompts, windows, sink, lambda passes: report("loss", passes, None))
    errors, halves = search.run(seconds)
    profile = replace(profile, errors=errors, halves=halves)
    if profile.target:
        profile = replace(profile, errors=search.refined(profile.errors, profile.plan()))
    return replace(profile, provenance={"passes": search.divergence.measured, "finished": search.finished})


def _split(
    prompts: list[Prompt], held_out: Any, windows: Sequence[int], sink: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to measure, and others to confirm a plan on."""
    if held_out is not None:
        confirming = as_prompts(held_out, windows, sink)
    elif len(prompts) >= 4:
        confirming = prompts[3::4]
        prompts = [prompt for i, prompt in enumerate(prompts) if i % 4 != 3]
    else:
        confirming = []
    if len(prompts) < 2:
        raise ValueError("there is 1 prompt: give two or more, so that the halves of the prompts can be compared")
    return prompts, confirming


def _windows(windows: Sequence[int]) -> tuple[int, ...]:
    if not windows or any(window < 1 for window in windows) or len(set(windows)) != len(windows):
        raise ValueError(f"windows={tuple(windows)}: give different numbers of tokens, such as (128, 512)")
    return tuple(sorted(windows))


def _provenance(model: PreTrainedModel, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What was measured, with what."""
    config = model.config
    return {
        "model": config.name_or_path or type(model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration": {
            "hash": fingerprint(prompts),
            "prompts": len(prompts),
            "lengths": sorted({len(prompt) for prompt in prompts}),
            "kinds": sorted({prompt.kind for prompt in prompts}),
            "scored": sum(len(prompt.targets) for prompt in prompts),
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
