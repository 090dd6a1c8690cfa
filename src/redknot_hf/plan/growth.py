"""Whether a plan takes anything that another has given up: a cache cannot bring back what it dropped."""

from __future__ import annotations

from .plan import HeadPlan
from .spec import HeadSpec
from .storage import STORAGES


def refuse_growth(old: HeadPlan, new: HeadPlan) -> None:
    """Checks that every head of `new` keeps a part of what it keeps under `old`, as coarsely at least.

    Raises:
        ValueError: One would see more than it holds, or finer than it is stored; names the first.
    """
    for i, layer in enumerate(new):
        for h, (was, wanted) in enumerate(zip(old[i], layer, strict=True)):
            if _grows(was, wanted):
                raise ValueError(
                    f"layer {i}, head {h} keeps {was} and cannot become {wanted}: what was dropped or rounded is "
                    "gone. Read the text again with the wider plan, or compress a cache.fork() that still holds it"
                )


def _grows(was: HeadSpec, wanted: HeadSpec) -> bool:
    if was.window is None:  # storages are named from fine to coarse
        stored = STORAGES.index(wanted.storage) < STORAGES.index(was.storage)
        return wanted.window is None and stored
    return wanted.window is None or wanted.window > was.window or wanted.sink > was.sink
