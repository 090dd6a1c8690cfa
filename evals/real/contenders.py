"""The plans that a frontier compares: by every method, for every budget."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from evals.real.items import Item
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.attention.watching import restricted, watching
from redknot_hf.profiling import HeadProfile

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.28, 0.4, 0.53)
_COMPARED = (0.1, 0.2, 0.28, 0.53)  # of methods that are compared with ours
_OURS = ("drift", "fisher")
SEEDS = (0, 1, 2)  # of random plans, which are drift's specs dealt to other heads
_RANDOM = (0.2,)


@dataclass(frozen=True)
class Contender:
    """A plan under its method's name.

    Attributes:
        budget: Share of the bytes that was asked for.
        kept: Share that the plan keeps of a text of the frontier's length.
        tells_text: Whether it is in force while a text is read.
    """

    method: str
    budget: float
    kept: float
    plan: HeadPlan
    tells_text = True

    def running(self, model: Any, item: Item) -> AbstractContextManager[None]:
        """The model answers an item under it, for the duration."""
        return watching(model, restricted(self.plan))


def contenders(config: Any, length: int, profiles: dict[str, HeadProfile]) -> Iterator[Contender]:
    """Yields all plans: of the profiles, by name, and those that take no profile.

    Budgets under what a profile's cheapest choices take are left out; of a search, and of a profile measured at
    another length, all budgets but its target.
    """
    drift = profiles["drift"]

    def make(method: str, budget: float, plan: HeadPlan) -> Contender:
        return Contender(method, budget, share(drift, plan, length), plan)

    for budget in BUDGETS:
        for name, profile in profiles.items():
            single = profile.searched is not None or profile.length != length
            ours = name.partition(" ")[0] in _OURS
            wanted = profile.target == {"budget": budget} if single else ours or budget in _COMPARED
            if wanted and profile.curve(length)[0][0] <= budget:
                yield make(name, budget, profile.plan(budget=budget, length=length))
        if budget in _COMPARED:
            spec = HeadSpec(max(1, int(budget * length) - 4), 4)
            yield make("streaming", budget, HeadPlan.uniform(config, spec))
        if budget in _RANDOM:
            for seed in SEEDS:
                yield make(f"random {seed}", budget, dealt(drift.plan(budget=budget, length=length), seed))
    for name, budget in (("int4", 0.28), ("int8", 0.53)):
        yield make(f"{name} everywhere", budget, HeadPlan.uniform(config, HeadSpec(storage=name)))


def share(profile: HeadProfile, plan: HeadPlan, length: int) -> float:
    """Share of the dense cache's bytes that a plan keeps of a text."""
    held, dense = 0, 0
    for layer, dims in zip(plan, profile.head_dims, strict=True):
        held += HeadPlan([layer]).nbytes(length, dims, profile.itemsize)
        dense += HeadPlan([(HeadSpec(),) * len(layer)]).nbytes(length, dims, profile.itemsize)
    return held / dense


def dealt(plan: HeadPlan, seed: int) -> HeadPlan:
    """The plan's specs, dealt to other heads at random."""
    specs = list(chain.from_iterable(plan))
    random.Random(seed).shuffle(specs)
    rest = iter(specs)
    return HeadPlan([list(islice(rest, len(layer))) for layer in plan])


def part(profile: HeadProfile, *, windows: bool, storages: bool) -> HeadProfile:
    """The same profile with some of its choices only."""
    kept = [i for i, spec in enumerate(profile.choices) if (storages if spec.is_global else windows)]
    first, second = (half[:, kept] for half in profile.halves)
    return HeadProfile(
        profile.method, profile.heads_by_layer, tuple(profile.choices[i] for i in kept), profile.errors[:, kept],
        (first, second), profile.length, profile.head_dims, profile.itemsize, provenance=profile.provenance,
    )  # fmt: skip
