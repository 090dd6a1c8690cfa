"""RedKnotCache with a plan, and the plans that a plan must be compared with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers import Cache

from evals.identity import plan_identity
from evals.method import Context, Method, read
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache


@dataclass(frozen=True)
class RedKnot(Method):
    """RedKnotCache with a plan."""

    plan: HeadPlan | None = None

    def prepare(self, model: Any, context: Context) -> Cache:
        assert self.plan is not None
        return read(model, RedKnotCache(model.config, self.plan), context)

    def check(self, cache: Cache) -> None:
        held = getattr(cache, "plan", None)
        if held != self.plan:
            raise ValueError(f"{self.name} says it holds {self.plan!r}, and its cache holds {held!r}, another plan")


def redknot(plan: HeadPlan, name: str = "redknot") -> RedKnot:
    """Return RedKnotCache with this plan."""
    return RedKnot(name, "redknot", plan_identity(plan), plan=plan)


def all_global(config: Any) -> RedKnot:
    """Return RedKnotCache in which every head keeps everything, which must equal the dense cache."""
    return redknot(HeadPlan.uniform(config, HeadSpec()), "redknot, all global")


def streaming(config: Any, window: int, sink: int = 4) -> RedKnot:
    """Return a cache whose every head keeps the same window and sinks (StreamingLLM, arXiv 2309.17453).

    Keys keep the angles of their place in the text here; StreamingLLM counts places within what it keeps.
    """
    return redknot(HeadPlan.uniform(config, HeadSpec(window, sink)), "streaming")


def wrong_heads(plan: HeadPlan, seed: int = 0) -> RedKnot:
    """Return RedKnotCache with a bad plan at the same ratio: as many heads of each kind, and the wrong ones."""
    return redknot(misplaced(plan, seed), "redknot, wrong heads")


def misplaced(plan: HeadPlan, seed: int = 0) -> HeadPlan:
    """Return a plan of the same specs in which heads that kept most keep least.

    Where more than half of the heads are global, some stay so.

    Args:
        plan: Mutated is nothing.
        seed: Decides among heads of the same kind.
    """
    places = [(i, h) for i, layer in enumerate(plan) for h in range(len(layer))]
    random.Random(seed).shuffle(places)
    places.sort(key=lambda place: _reach(plan[place[0]][place[1]]))
    specs = sorted(chain.from_iterable(plan), key=_reach, reverse=True)
    given = dict(zip(places, specs, strict=True))
    heads = [[given[i, h] for h in range(len(layer))] for i, layer in enumerate(plan)]
    return HeadPlan(heads, provenance={"misplaced": plan_identity(plan)["plan"], "seed": seed})


def stored(config: Any, storage: str = "int8") -> RedKnot:
    """Return RedKnotCache in which every head keeps everything, in fewer bits.

    At 4 bits it holds about as many bytes as transformers' quantised caches do.
    """
    return redknot(HeadPlan.uniform(config, HeadSpec()).stored(storage), f"redknot, {storage}")


def kept_share(plan: HeadPlan, length: int, config: Any) -> float:
    """Return the bytes that a plan keeps of a text of `length` tokens, as a share of those of all keys and values.

    Args:
        plan: Of a model of this config.
        length: Tokens.
        config: Says dims, and the dtype of what is not stored in fewer bits: of two bytes, where it does not.
    """
    size = getattr(config, "dtype", None) or 2
    return plan.nbytes(length, config, size) / HeadPlan.uniform(config, HeadSpec()).nbytes(length, config, size)


def _reach(spec: HeadSpec) -> tuple[float, int]:
    """What orders heads by how much they keep: how far they see, and how finely."""
    return (float("inf") if spec.window is None else spec.window + spec.sink), ("int4", "int8", "model").index(
        spec.storage
    )
