"""What a plan costs on prompts that had no part in choosing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from redknot_hf.plan.plan import HeadPlan

from .divergence import Divergence
from .prompt import Prompt

# A plan holds at a length if at most this share of the scored tokens more is predicted wrong there than by the model,
TOLERANCE = 0.01
# and if its predictions are no further from the model's than this, in nats a scored token.
MAX_KL = 0.05
# A kind of prompts of which the model itself predicts less than this share of the scored tokens shows nothing. Running
# text is no question, and is always judged.
ABLE = 1 / 3
_FREE_TEXT = "text"
_RESAMPLES = 2000
_FEWEST = 4  # prompts without which resampling them says nothing

Found = dict[str, float]


def fidelity(
    model: PreTrainedModel, plan: HeadPlan, prompts: Sequence[Prompt], max_kl: float = MAX_KL
) -> list[dict[str, Any]]:
    """Compares a plan with the unrestricted model, for each length of the prompts.

    Args:
        max_kl: Nats a scored token that a plan which holds may be off.

    Returns:
        For each length, ascending, what `judged` says.

    Raises:
        ValueError: A prediction is not finite.
    """
    return Confirmation(model, prompts)(plan, max_kl)


class Confirmation:
    """Plans of a model, held against it on prompts whose dense predictions are kept.

    Args:
        model: The model.
        prompts: Of any lengths and kinds.

    Attributes:
        passes: Forward passes that judging a plan takes.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> None:
        lengths = sorted({len(prompt) for prompt in prompts})
        self.parts = [[prompt for prompt in prompts if len(prompt) == length] for length in lengths]
        self.divergences = [Divergence(model, part) for part in self.parts]
        self.passes = len(prompts)

    def __call__(self, plan: HeadPlan, max_kl: float = MAX_KL) -> list[dict[str, Any]]:
        """What `judged` says of a plan, for each length, ascending."""
        pairs = zip(self.parts, self.divergences, strict=True)
        return [judged(part, divergence.compare(plan), max_kl) for part, divergence in pairs]


def judged(prompts: Sequence[Prompt], found: Sequence[Found], max_kl: float = MAX_KL) -> dict[str, Any]:
    """What was found on prompts of one length, in a row, and whether the plan holds there.

    Args:
        prompts: All of one length.
        found: Of each prompt what `Divergence.compare` says.
        max_kl: Nats a scored token.

    Returns:
        `length`, `prompts`, and over the kinds that are judged, each counting alike: `kl` (nats a scored token),
        `agreement` (share of scored tokens whose likeliest token stays), `accuracy` and `dense_accuracy` (share whose
        likeliest token is right); `kl_interval` and `accuracy_interval` (of the difference to dense), 95 %, by
        resampling prompts, `None` for too few of them. `kinds`: the same of each kind, with `judged`, whether the
        model itself can do it. Where it can do none, the figures are of all kinds, and the plan does not hold.
        `holds`: the accuracy is at most a hundredth below the dense one, and the KL at most `max_kl`.
    """
    groups: dict[str, list[Found]] = {}
    for prompt, row in zip(prompts, found, strict=True):
        groups.setdefault(prompt.kind, []).append(row)
    kinds = [_kind(kind, rows) for kind, rows in groups.items()]
    able = [rows for kind, rows in zip(kinds, groups.values(), strict=True) if kind["judged"]]
    counted = able or list(groups.values())
    means = _means(counted)
    right = means["accuracy"] >= means["dense_accuracy"] - TOLERANCE
    row = {"length": len(prompts[0]), "prompts": len(prompts), **_rounded(means), **_intervals(counted)}
    return row | {"max_kl": max_kl, "kinds": kinds, "holds": bool(able) and right and means["kl"] <= max_kl}


def _kind(kind: str, rows: Sequence[Found]) -> dict[str, Any]:
    means = _means([rows])
    able = kind == _FREE_TEXT or means["dense_accuracy"] >= ABLE
    return {"kind": kind, "prompts": len(rows), **_rounded(means), "judged": able}


def _means(groups: Sequence[Sequence[Found]]) -> Found:
    """Over the prompts of each group, and then over the groups."""
    return {name: float(np.mean([np.mean([row[name] for row in rows]) for rows in groups])) for name in groups[0][0]}


def _rounded(means: Found) -> Found:
    return {name: round(mean, 5) for name, mean in means.items()}


def _intervals(groups: Sequence[Sequence[Found]]) -> dict[str, list[float] | None]:
    """Of the KL and of the accuracy's difference to dense, resampling the prompts of every kind."""
    if sum(map(len, groups)) < _FEWEST or min(map(len, groups)) < 2:  # one prompt of a kind has no spread
        return {"kl_interval": None, "accuracy_interval": None}
    columns = {
        "kl_interval": [[row["kl"] for row in rows] for rows in groups],
        "accuracy_interval": [[row["accuracy"] - row["dense_accuracy"] for row in rows] for rows in groups],
    }
    rng, found = np.random.default_rng(0), {}
    for name, column in columns.items():
        drawn = [rng.choice(np.array(values), (_RESAMPLES, len(values))).mean(1) for values in column]
        found[name] = [round(float(end), 5) for end in np.quantile(np.mean(drawn, 0), (0.025, 0.975))]
    return found
