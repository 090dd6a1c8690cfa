"""What heads may keep: how people call it, and which of two choices keeps more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from redknot_hf.plan.spec import HeadSpec
from redknot_hf.plan.storage import STORAGES

Errors = Float[np.ndarray, "heads choices"]


def name_of(spec: HeadSpec) -> str:
    """What a choice is called where people read it."""
    if spec.window is not None:
        return f"window {spec.window}"
    return "everything" if spec.storage == "model" else spec.storage


def falling(errors: Errors, choices: Sequence[HeadSpec]) -> Errors:
    """Who keeps more errs no more; noise must not say otherwise."""
    found = errors.copy()
    for column, spec in enumerate(choices):
        more = [i for i, other in enumerate(choices) if _keeps_all_of(other, spec)]
        found[:, column] = errors[:, more].max(1)
    return found


def _keeps_all_of(more: HeadSpec, less: HeadSpec) -> bool:
    """Whether the first keeps all that the second keeps, and as well."""
    if more.window is None and less.window is None:
        return STORAGES.index(more.storage) <= STORAGES.index(less.storage)
    if more.window is None or less.window is None:
        return False  # few bits of everything and all bits of a window cannot be compared
    return more.window >= less.window and more.sink + more.window >= less.sink + less.window
