"""`profile_heads`: from a model and some prompts to a profile of its KV heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from redknot_hf.attention.watching import check_model
from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.per_layer import kv_dims
from redknot_hf.plan.plan import HeadPlan, HeadSpec
from redknot_hf.plan.storage import STORAGES

from .clock import Clock
from .fidelity import MAX_KL, Confirmation
from .head_profile import HeadProfile, Number, check_target
from .holders import Holders
from .measuring import FEWEST, Job, Report, measured, provenance_of
from .prompt import Prompt, as_prompts, held_apart

METHODS = ("drift", "fisher", "loss", "mass", "gates")
WINDOWS = (64, 256, 1024)  # and a quarter of the length that will be served
_BY_GRADIENTS = ("fisher", "loss", "gates")
_TRIES = 7  # budgets that are confirmed in the search for the smallest that holds


@torch.inference_mode(False)  # some methods need gradients, wherever they are called
def profile_heads(  # noqa: PLR0913 - every one is a choice of the caller
    model: PreTrainedModel,
    inputs: Any,
    *,
    budget: Number | None = None,
    global_ratio: Number | None = None,
    bytes_per_token: Number | None = None,
    max_kl: Number | None = None,
    windows: Sequence[int] | None = None,
    sink: int = 4,
    storages: Sequence[str] = (),
    method: str = "drift",
    held_out: Any = None,
    seconds: Number | None = None,
    steps: int = 100,
    checkpoint: AnyPath | None = None,
    report: Report | None = None,
) -> HeadProfile:
    """Measures what each choice costs in each KV head of a model: which heads can do with a window.

    Args:
        model: Runs with `attn_implementation="redknot"`; unchanged afterwards.
        inputs: Prompts (`calibration_prompts` makes some), sequences of token ids, or a tensor with a prompt a row.
            Two at least, so that two halves can be compared.
        budget: Share of the dense cache's bytes that the plan may keep of the longest prompt.
        global_ratio: Or the share of its heads that are global.
        bytes_per_token: Or the bytes a token that it may keep. Without any of the three, `plan` of the profile asks.
        max_kl: Mean KL, in nats a scored token, that a plan which holds may be off on the prompts held out; 0.05 by
            default. Given without any of the three bounds, the target is the smallest budget whose plan holds.
        windows: Candidate windows of local heads, in tokens; by default 64, 256, 1024 and a quarter of the longest
            prompt, as far as they are shorter than half of the shortest prompt.
        sink: First tokens that local heads keep.
        storages: Of fewer bits, that a head which keeps everything may take: of `"int8"` and `"int4"`.
        method: `"drift"`: error of the head's output, one forward pass a prompt. `"fisher"`: what that does to the
            predictions, by eight backward passes a prompt; to try below a quarter of the bytes. `"loss"`: KL
            divergence of the predictions; for a budget of bytes the plan of fisher, whose choices are swapped while
            the KL falls, else a search that restricts heads together, in hundreds of forward passes. `"mass"`:
            attention outside of the window, the paper's criterion. `"gates"`: gates between full and windowed output,
            trained by distillation; one window.
        held_out: Prompts like `inputs`, of any lengths, on which the plan for the target is confirmed. By default a
            quarter of the inputs of every kind is held out, where there are four or more; they have no part in the
            profile.
        seconds: Time for the whole run, about: fewer prompts are measured, searches end, and what confirming takes is
            kept back. The provenance says what it was enough for (`calibration`, `finished`).
        steps: Training steps of `"gates"`, of one prompt each, for each half of the prompts.
        checkpoint: File that the training of `"gates"` is kept in, and goes on from.
        report: Called with the name of a stage, steps done and steps in all, `None` if unknown.

    Raises:
        ValueError: The model cannot be profiled, a prompt is no longer than the widest window, a budget is impossible,
            no budget holds, or the model computes NaN.
        torch.OutOfMemoryError: The device is too small for the method's gradients.
    """
    check_model(model)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {METHODS}")
    if method in _BY_GRADIENTS and any(weight.is_inference() for weight in model.parameters()):
        raise ValueError(
            f"method={method!r} needs gradients, and a model that was loaded in torch.inference_mode() has none: load "
            "it outside, or profile by drift"
        )
    bound = {"budget": budget, "global_ratio": global_ratio, "bytes_per_token": bytes_per_token}
    target = {name: value for name, value in bound.items() if value is not None}
    if target:
        check_target(target)
    if max_kl is not None and not max_kl > 0:
        raise ValueError(f"max_kl={max_kl}: give nats a token above 0, such as 0.05")
    prompts = as_prompts(inputs)
    windows = _default_windows(prompts) if windows is None else _windows(windows)
    if method == "gates" and len(windows) > 1:
        raise ValueError(f"windows={windows}: gates are trained for one window, such as windows=(256,)")
    inside, confirming = _split(as_prompts(prompts, windows, sink), held_out, windows, sink)
    if max_kl is not None and not target and not confirming:
        kinds = len({prompt.kind for prompt in prompts})
        raise ValueError(f"max_kl is looked for on prompts held out, and {len(prompts)} inputs (kinds: {kinds}) leave "
                         f"none: give {max(4, kinds + 1)} or more, or held_out")  # fmt: skip
    job = Job(
        model, inside, confirming, Clock(seconds), report or (lambda stage, done, total: None),
        float(MAX_KL if max_kl is None else max_kl), steps, checkpoint,
    )  # fmt: skip
    profile = _blank(job, method, _choices(windows, sink, storages, method), target)
    if target:
        profile.plan()  # an impossible budget is told before the work
    profile = _confirmed(_measured(profile, job), job, search=max_kl is not None and not target)
    return replace(profile, provenance={**profile.provenance, "seconds": round(job.clock.taken, 1)})


def _measured(profile: HeadProfile, job: Job) -> HeadProfile:
    try:
        return measured(profile, job)
    except torch.OutOfMemoryError as e:
        if profile.method not in _BY_GRADIENTS:
            raise
        raise torch.OutOfMemoryError(
            f"method={profile.method!r} keeps what gradients need and ran out of memory on prompts of "
            f"{profile.length} tokens: give shorter prompts, or profile by drift, a forward pass a prompt"
        ) from e


def _blank(job: Job, method: str, choices: tuple[HeadSpec, ...], target: Mapping[str, Number]) -> HeadProfile:
    """A profile of which nothing is measured yet."""
    holders = Holders.of(job.model.config)
    dims, size, length = kv_dims(job.model.config), job.model.dtype.itemsize, max(map(len, job.prompts))
    # Cheapest first.
    choices = tuple(sorted(choices, key=lambda spec: HeadPlan([[spec]]).nbytes(length, dims[0], size)))
    zeros = np.zeros((sum(holders.by_layer), len(choices)))
    return HeadProfile(
        method=method, heads_by_layer=holders.heads, sources=holders.sources if 0 in holders.by_layer else None,
        choices=choices, errors=zeros, halves=(zeros, zeros),
        length=length, head_dims=dims, itemsize=size, target=target, provenance=provenance_of(job.model, job.prompts),
    )  # fmt: skip


def _confirmed(profile: HeadProfile, job: Job, search: bool) -> HeadProfile:
    """The profile with what its plan costs on prompts held out; `search` makes the smallest that holds its target."""
    if not profile.target and not search:
        return profile
    provenance = dict(profile.provenance)
    if job.confirming:
        job.report("held out", 0, None)
        confirmation = Confirmation(job.model, job.confirming)
        if search:
            profile = replace(profile, target={"budget": _smallest(profile, job, confirmation)})
        provenance["held_out"] = confirmation(profile.plan(), job.max_kl)
    else:
        provenance["held_out"] = []
    return replace(profile, provenance=provenance | {"overlap": round(profile.overlap(), 4)})


def _smallest(profile: HeadProfile, job: Job, confirmation: Confirmation) -> float:
    """The smallest budget whose plan holds at every length, by bisection of the ratio of bytes."""
    low, high = max(profile.curve()[0][0], 1e-4), 1.0
    for step in range(_TRIES):
        budget = math.ceil(1e4 * math.sqrt(low * high)) / 1e4
        holds = all(row["holds"] for row in confirmation(profile.plan(budget=budget), job.max_kl))
        job.report("budgets", step + 1, _TRIES)
        low, high = (low, budget) if holds else (budget, high)
    if high == 1.0 and not all(row["holds"] for row in confirmation(profile.plan(budget=1.0), job.max_kl)):
        raise ValueError(
            "no budget holds, not even all of the bytes: the model itself can do none of the kinds of prompts that "
            "are held out; give others (kinds, texts), or a budget"
        )
    return high


def _split(
    prompts: list[Prompt], held_out: Any, windows: Sequence[int], sink: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to measure, and others to confirm a plan on."""
    measured, confirming = held_apart(prompts) if held_out is None else (prompts, as_prompts(held_out, windows, sink))
    if len(measured) < FEWEST:
        raise ValueError("there is 1 prompt: give two or more, so that the halves of the prompts can be compared")
    return measured, confirming


def _windows(windows: Sequence[int]) -> tuple[int, ...]:
    if not windows or any(window < 1 for window in windows) or len(set(windows)) != len(windows):
        raise ValueError(f"windows={tuple(windows)}: give different numbers of tokens, such as (128, 512)")
    return tuple(sorted(windows))


def _choices(windows: Sequence[int], sink: int, storages: Sequence[str], method: str) -> tuple[HeadSpec, ...]:
    known = STORAGES[1:]
    if set(storages) - set(known) or len(set(storages)) != len(storages):
        raise ValueError(f"storages={tuple(storages)}: choose different ones of {known}")
    if storages and method in ("mass", "gates"):
        raise ValueError(
            f"storages={tuple(storages)}: {method} looks at windows alone; give method='drift', 'fisher' or 'loss'"
        )
    return (*(HeadSpec(window, sink) for window in windows), *(HeadSpec(storage=storage) for storage in storages))


def _default_windows(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    lengths = sorted(map(len, prompts))
    fitting = {window for window in (*WINDOWS, lengths[-1] // 4) if 1 <= window <= lengths[0] // 2}
    return tuple(sorted(fitting)) or (max(1, lengths[0] // 4),)
