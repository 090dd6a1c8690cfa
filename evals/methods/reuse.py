"""Caches assembled from stored documents: how much of each is recomputed in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import Cache

from evals.identity import plan_identity
from evals.method import Context, Method
from redknot_hf import AssembledCache, HeadPlan, SegmentRef, SegmentStore, assemble, refresh


@dataclass(frozen=True)
class Reuse(Method):
    """Stores every document once, behind the context's first, and builds contexts out of what is stored.

    The first time a document is seen its storing is part of the time; later contexts find it.

    Attributes:
        plan: What heads keep.
        boundary: Of `assemble`; `None` leaves the choice of tokens to `refresh`.
        share, by: Of `refresh`.
        prefix: Documents are stored behind the context's first one, and not alone.
    """

    plan: HeadPlan | None = None
    boundary: int | float | str | None = 0.1
    share: float = 0.15
    by: str = "deviation"
    prefix: bool = True
    stores: list[SegmentStore] = field(default_factory=list, compare=False, repr=False)

    def prepare(self, model: Any, context: Context) -> Cache:
        return self.build(model, self.stored(model, context))

    def stored(self, model: Any, context: Context) -> list[list[SegmentRef]]:
        """Return each row's documents as the store has them, which stores those that it has not."""
        if not all(context.documents):
            raise ValueError(f"{self.name} reuses documents, and the task names none: choose one that does")
        store = self.store(model)
        rows = []
        for first, *others in context.documents:
            opening = store.add(first)
            rows.append([opening, *store.add_all(others, opening if self.prefix else None)])
        return rows

    def build(self, model: Any, rows: list[list[SegmentRef]]) -> AssembledCache:
        """Return the cache of stored documents."""
        if self.boundary is None:
            return refresh(model, rows, share=self.share, by=self.by)
        boundary: Any = only_prefix if self.boundary == "prefix" else self.boundary
        return assemble(model, rows, boundary=boundary)

    def check(self, cache: Cache) -> None:
        if not isinstance(cache, AssembledCache) or cache.plan != self.plan:
            raise ValueError(f"{self.name} says it assembles a cache of {self.plan!r}, and its cache is {cache!r}")

    def store(self, model: Any) -> SegmentStore:
        """Return the store of a model, checked; another model's is forgotten."""
        if not self.stores or self.stores[0].model is not model:
            assert self.plan is not None
            keep = "full" if self.boundary is None else "plan"
            self.stores[:] = [SegmentStore(model, self.plan, keep=keep)]
            self.stores[0].verdict()  # once a model, and no part of a context's time but the first's
        return self.stores[0]


def only_prefix(ref: SegmentRef, start: int) -> Any:
    """Return the boundary under which only segments behind exactly what they were stored behind are reused."""
    return "all"


def reuse(plan: HeadPlan, boundary: int | float | str = 0.1, prefix: int = 1) -> Reuse:
    """Return reuse with a boundary: tokens, a share, "all", or "prefix" for what a prefix cache would reuse."""
    behind = "" if prefix else ", no prefix"
    name = f"reuse, boundary {boundary:.0%}" if isinstance(boundary, float) else f"reuse, boundary {boundary}"
    identity = {**plan_identity(plan), "boundary": boundary, "prefix": bool(prefix)}
    return Reuse(name + behind, "redknot", identity, plan=plan, boundary=boundary, prefix=bool(prefix))


def refreshed(plan: HeadPlan, share: float = 0.15, by: str = "deviation") -> Reuse:
    """Return reuse in which a share of the tokens, chosen one by one, is recomputed."""
    identity = {**plan_identity(plan), "share": share, "by": by}
    name = f"reuse, {by} {share:.0%}"
    return Reuse(name, "redknot", identity, batched=False, plan=plan, boundary=None, share=share, by=by)
