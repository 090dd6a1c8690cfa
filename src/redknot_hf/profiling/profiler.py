"""`profile_heads`: from a model and some prompts to a profile of its KV heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from redknot_hf.attention.watching import check_model
from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.per_layer import kv_dims, kv_heads
from redknot_hf.plan.plan import HeadSpec

from .clock import Clock
from .drift import drift, measure_drift
from .fidelity import MAX_KL, Confirmation
from .gates import train_gates
from .head_profile import HeadProfile, Number, check_target
from .loss import LossSearch
from .mass import measure_mass
from .prompt import Prompt, as_prompts, fingerprint, held_apart
from .swaps import SwapSearch

METHODS = ("drift", "loss", "mass", "gates")
WINDOWS = (64, 256, 1024)  # and a quarter of the length that will be served
_TRIES = 7  # budgets that are confirmed in the search for the smallest that holds
_FEWEST = 2  # prompts that a profile is of, at least, however little time there is
# Name of a stage, steps done, and steps in all where that is known.
Report = Callable[[str, int, int | None], object]


@dataclass(frozen=True)
class Job:
    """What a profile is made of.

    Attributes:
        prompts: To measure on.
        confirming: To confirm a plan on.
        clock: Bounds all of it.
        max_kl: Nats a scored token that a plan which holds may be off.
    """

    model: PreTrainedModel
    prompts: list[Prompt]
    confirming: list[Prompt]
    clock: Clock
    report: Report
    max_kl: float
    steps: int
    checkpoint: AnyPath | None


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
        method: `"drift"`: error of the head's output, one forward pass a prompt. `"loss"`: KL divergence of the
            predictions; for a budget of bytes the plan of drift, whose choices are swapped while the KL falls, else a
            search that restricts heads together, in hundreds of forward passes. `"mass"`: attention outside of the
            window, the paper's criterion. `"gates"`: gates between full and windowed output, trained by distillation;
            one window.
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
    """
    check_model(model)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {METHODS}")
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
    measured, confirming = _split(as_prompts(prompts, windows, sink), held_out, windows, sink)
    if max_kl is not None and not target and not confirming:
        raise ValueError("max_kl is looked for on prompts held out: give held_out, or four inputs or more")
    job = Job(
        model, measured, confirming, Clock(seconds), report or (lambda stage, done, total: None),
        float(MAX_KL if max_kl is None else max_kl), steps, checkpoint,
    )  # fmt: skip
    profile = _blank(job, method, tuple(HeadSpec(window, sink) for window in windows), target)
    if target:
        profile.plan()  # an impossible budget is told before the work
    profile = _confirmed(_measured(profile, job), job, search=max_kl is not None and not target)
    return replace(profile, provenance={**profile.provenance, "seconds": round(job.clock.taken, 1)})


def _blank(job: Job, method: str, choices: tuple[HeadSpec, ...], target: Mapping[str, Number]) -> HeadProfile:
    """A profile of which nothing is measured yet."""
    shape = kv_heads(job.model.config)
    zeros = np.zeros((sum(shape), len(choices)))
    return HeadProfile(
        method=method, heads_by_layer=shape, choices=choices, errors=zeros, halves=(zeros, zeros),
        length=max(map(len, job.prompts)), head_dims=kv_dims(job.model.config), itemsize=job.model.dtype.itemsize,
        target=target, provenance=_provenance(job.model, job.prompts),
    )  # fmt: skip


def _measured(profile: HeadProfile, job: Job) -> HeadProfile:
    """The profile with its errors, by its method."""
    steps = count(1)
    windows, sink = profile.windows, profile.choices[0].sink
    if profile.method == "mass":
        tick = lambda: job.report("mass", next(steps), len(job.prompts))  # noqa: E731
        mass = measure_mass(job.model, job.prompts, windows, sink, tick)
        return replace(profile, errors=mass.mean(0), halves=(mass[::2].mean(0), mass[1::2].mean(0)))
    if profile.method == "gates":
        tick = lambda: job.report("gates", next(steps), 2 * job.steps)  # noqa: E731
        left = job.clock.left() if math.isfinite(job.clock.seconds) else None
        gates = train_gates(
            job.model, job.prompts, profile.choices[0], job.steps, tick, seconds=left, path=job.checkpoint
        )
        first, second = (half[:, None] for half in gates)
        return replace(profile, errors=(first + second) / 2, halves=(first, second))
    by_bytes = bool(profile.target.keys() & {"budget", "bytes_per_token"})
    if profile.method == "loss" and not by_bytes:
        return _by_path(profile, job)
    found = _by_drift(profile, job)
    return _by_swaps(found, job) if profile.method == "loss" else found


def _by_drift(profile: HeadProfile, job: Job) -> HeadProfile:
    """Measures as many prompts as there is time for; what confirming takes is kept back."""
    steps = count(1)

    def tick() -> bool:
        done = next(steps)
        job.report("drift", done, len(job.prompts))
        each = job.clock.taken / done
        return done >= _FEWEST and job.clock.left(2 * each * len(job.confirming)) < each

    sums = measure_drift(job.model, job.prompts, profile.choices, tick)
    whole, *halves = (drift(part) for part in (sums, sums[::2], sums[1::2]))
    used = _provenance(job.model, job.prompts[: len(sums)])
    return replace(profile, errors=whole, halves=(halves[0], halves[1]), provenance=used)


def _by_swaps(profile: HeadProfile, job: Job) -> HeadProfile:
    """Drift's plan for the target, its choices swapped; errors are drift's, as shares of that plan's KL."""
    each = job.clock.taken / len(job.prompts)
    as_drift = replace(profile, method="drift")
    search = SwapSearch(
        job.model, job.prompts, profile.choices, as_drift.costs(), lambda passes: job.report("loss", passes, None)
    )
    picks = as_drift.picks()
    found = search.run(picks, as_drift.bytes_allowed(), job.clock, 2 * each * len(job.confirming))
    drifts = np.concatenate([profile.errors, np.zeros((len(picks), 1))], 1)[np.arange(len(picks)), picks]
    unit = search.kl[0] / max(float((drifts**2).sum()), np.finfo(float).tiny)
    first, second = profile.halves
    swaps = {"passes": search.proposing.measured + search.deciding.measured, "finished": search.finished}
    swaps |= {"kl_by_swaps": [round(kl, 5) for kl in search.kl]}
    return replace(
        profile, errors=unit * profile.errors**2, halves=(unit * first**2, unit * second**2),
        searched=tuple(map(int, found)), provenance={**profile.provenance, **swaps},
    )  # fmt: skip


def _by_path(profile: HeadProfile, job: Job) -> HeadProfile:
    """A search over heads that are restricted together, window by window."""
    search = LossSearch(
        job.model, job.prompts, profile.windows, profile.choices[0].sink,
        lambda passes: job.report("loss", passes, None),
    )  # fmt: skip
    errors, halves = search.run(job.clock.left(_path_reserve(job)) if math.isfinite(job.clock.seconds) else None)
    profile = replace(profile, errors=errors, halves=halves)
    if profile.target:
        profile = replace(profile, errors=search.refined(profile.errors, profile.plan()))
    found = {"passes": search.divergence.measured, "finished": search.finished}
    return replace(profile, provenance={**profile.provenance, **found})


def _path_reserve(job: Job) -> float:
    """Seconds that confirming will take, by what was measured so far: drift and the dense predictions."""
    return job.clock.taken / (2 * len(job.prompts)) * 2 * len(job.confirming)


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
    if len(measured) < _FEWEST:
        raise ValueError("there is 1 prompt: give two or more, so that the halves of the prompts can be compared")
    return measured, confirming


def _windows(windows: Sequence[int]) -> tuple[int, ...]:
    if not windows or any(window < 1 for window in windows) or len(set(windows)) != len(windows):
        raise ValueError(f"windows={tuple(windows)}: give different numbers of tokens, such as (128, 512)")
    return tuple(sorted(windows))


def _default_windows(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    lengths = sorted(map(len, prompts))
    fitting = {window for window in (*WINDOWS, lengths[-1] // 4) if 1 <= window <= lengths[0] // 2}
    return tuple(sorted(fitting)) or (max(1, lengths[0] // 4),)


def _provenance(model: PreTrainedModel, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What was measured, with what. Of a folder of this machine only its name is said."""
    config = model.config
    name = config.name_or_path or type(model).__name__
    return {
        "model": Path(name).resolve().name if Path(name).exists() else name,
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
