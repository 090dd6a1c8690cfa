"""A profile's errors, by each of the methods, in the time there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from redknot_hf.plan.formats import AnyPath

from .clock import Clock
from .drift import drift, measure_drift
from .fisher import fisher, measure_fisher
from .gates import train_gates
from .head_profile import HeadProfile
from .holders import Holders
from .loss import LossSearch
from .mass import measure_mass
from .prompt import Prompt, fingerprint, halves
from .swaps import SwapSearch

FEWEST = 2  # prompts that a profile is of, at least, however little time there is
# What confirming a prompt takes, by what measuring one does: two forward passes to one, or to one and eight backward.
_CONFIRMING = {"drift": 1.0, "fisher": 0.25}
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


def measured(profile: HeadProfile, job: Job) -> HeadProfile:
    """The profile with its errors, by its method."""
    steps = count(1)
    windows, sink = profile.windows, max(spec.sink for spec in profile.choices)
    holders = Holders.of(job.model.config)
    if profile.method == "mass":
        tick = lambda: job.report("mass", next(steps), len(job.prompts))  # noqa: E731
        mass = measure_mass(job.model, job.prompts, windows, sink, tick)
        mass = np.stack([holders.fold(each, np.maximum) for each in mass])
        first, second = halves([prompt.kind for prompt in job.prompts])
        return replace(profile, errors=mass.mean(0), halves=(mass[first].mean(0), mass[second].mean(0)))
    if profile.method == "gates":
        tick = lambda: job.report("gates", next(steps), 2 * job.steps)  # noqa: E731
        left = job.clock.left() if math.isfinite(job.clock.seconds) else None
        gates = train_gates(
            job.model, job.prompts, profile.choices[0], job.steps, tick, seconds=left, path=job.checkpoint
        )
        first, second = (holders.fold(half[:, None], np.maximum) for half in gates)
        return replace(profile, errors=(first + second) / 2, halves=(first, second))
    by_bytes = bool(profile.target.keys() & {"budget", "bytes_per_token"})
    if profile.method == "loss" and not by_bytes:
        return _by_path(profile, job)
    if profile.method == "drift":
        return _by_drift(profile, job)
    if profile.method == "fisher":
        return _by_fisher(profile, job)
    half = job.clock.seconds / 2 if math.isfinite(job.clock.seconds) else 0.0
    return _by_swaps(_by_fisher(profile, job, kept=half), job)


def _ticks(stage: str, job: Job, kept: float = 0.0) -> Callable[[], bool]:
    """Counts prompts, of which as many are measured as there is time for.

    What confirming takes is kept back, and `kept` seconds more. How long a prompt takes is told by all but the first,
    in which kernels are compiled.
    """
    ends: list[float] = []

    def tick() -> bool:
        ends.append(job.clock.taken)
        job.report(stage, len(ends), len(job.prompts))
        if len(ends) < FEWEST:
            return False
        each = (ends[-1] - ends[0]) / (len(ends) - 1)
        return job.clock.left(kept + each * _CONFIRMING[stage] * len(job.confirming)) < each

    return tick


def _by_fisher(profile: HeadProfile, job: Job, kept: float = 0.0) -> HeadProfile:
    """Measures as many prompts as there is time for, when so many seconds are kept."""
    errors, right = measure_fisher(job.model, job.prompts, profile.choices, _ticks("fisher", job, kept))
    kinds = [prompt.kind for prompt in job.prompts[: len(errors)]]
    holders = Holders.of(job.model.config)
    whole, first, second = (
        holders.fold(fisher((errors[some], right[some]), [kinds[i] for i in some]))
        for some in (list(range(len(kinds))), *halves(kinds))
    )
    used = provenance_of(job.model, job.prompts[: len(errors)])
    return replace(profile, errors=whole, halves=(first, second), provenance=used)


def _by_drift(profile: HeadProfile, job: Job) -> HeadProfile:
    """Measures as many prompts as there is time for."""
    sums = measure_drift(job.model, job.prompts, profile.choices, _ticks("drift", job))
    holders = Holders.of(job.model.config)
    used = job.prompts[: len(sums)]
    kinds = [prompt.kind for prompt in used]
    whole, first, second = (
        holders.fold(drift(sums[some], [kinds[i] for i in some]) ** 2) ** 0.5
        for some in (list(range(len(kinds))), *halves(kinds))
    )
    return replace(profile, errors=whole, halves=(first, second), provenance=provenance_of(job.model, used))


def _by_swaps(profile: HeadProfile, job: Job) -> HeadProfile:
    """Fisher's plan for the target, its choices swapped; the errors stay Fisher's."""
    errors = np.concatenate([profile.errors, np.zeros((len(profile.errors), 1))], 1)
    begun = job.clock.taken
    search = SwapSearch(
        job.model, job.prompts, profile.choices, profile.costs(), errors,
        lambda passes: job.report("loss", passes, None),
    )  # fmt: skip
    dense = (job.clock.taken - begun) / len(job.prompts)  # a forward pass; confirming takes two
    found = search.run(profile.picks(), profile.bytes_allowed(), job.clock, 2 * dense * len(job.confirming))
    swaps = {"passes": search.divergence.measured, "finished": search.finished}
    swaps |= {"kl_by_swaps": [round(kl, 5) for kl in search.kl]}
    return replace(profile, searched=tuple(map(int, found)), provenance={**profile.provenance, **swaps})


def _by_path(profile: HeadProfile, job: Job) -> HeadProfile:
    """A search over heads that are restricted together, window by window."""
    if len(profile.choices) > len(profile.windows):
        raise ValueError("a search for a ratio of global heads looks at windows alone: give a budget, or no storages")
    search = LossSearch(
        job.model, job.prompts, profile.windows, max(spec.sink for spec in profile.choices),
        lambda passes: job.report("loss", passes, None),
    )  # fmt: skip
    errors, halves = search.run(job.clock.left(_reserve(job)) if math.isfinite(job.clock.seconds) else None)
    profile = replace(profile, errors=errors, halves=halves)
    if profile.target:
        profile = replace(profile, errors=search.refined(profile.errors, profile.plan()))
    found = {"passes": search.divergence.measured, "finished": search.finished}
    return replace(profile, provenance={**profile.provenance, **found})


def _reserve(job: Job) -> float:
    """Seconds that confirming may take: as many a prompt as all that was done to each so far, which was more."""
    return job.clock.taken / len(job.prompts) * len(job.confirming)


def provenance_of(model: PreTrainedModel, prompts: Sequence[Prompt]) -> dict[str, Any]:
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
