"""What a plan costs on prompts that had no part in choosing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from redknot_hf.plan.plan import HeadPlan

from .divergence import Divergence
from .prompt import Prompt

# A plan holds at a length if at most this share of the scored tokens more is predicted wrong there than by the model.
TOLERANCE = 0.01


def fidelity(model: PreTrainedModel, plan: HeadPlan, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Compares a plan with the unrestricted model, for each length of the prompts.

    Returns:
        For each length, ascending: `length`, `prompts`, `kl` (nats a scored token), `agreement` (share of scored
        tokens whose likeliest token stays), `accuracy` and `dense_accuracy` (share whose likeliest token is right),
        and `holds`: the accuracy is at most a hundredth below the dense one.

    Raises:
        ValueError: A prediction is not finite.
    """
    found: list[dict[str, Any]] = []
    for length in sorted({len(prompt) for prompt in prompts}):
        some = [prompt for prompt in prompts if len(prompt) == length]
        means = Divergence(model, some).compare(plan)
        row = {"length": length, "prompts": len(some), **{name: round(mean, 5) for name, mean in means.items()}}
        found.append(row | {"holds": means["accuracy"] >= means["dense_accuracy"] - TOLERANCE})
    return found
