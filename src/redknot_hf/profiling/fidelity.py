"""What a plan costs on prompts that had no part in choosing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from redknot_hf.plan import HeadPlan

from .divergence import Divergence
from .prompt import Prompt

# A plan holds at another length if the likeliest token changes at most this much more often there.
TOLERANCE = 0.01


def fidelity(model: PreTrainedModel, plan: HeadPlan, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Compares a plan with the unrestricted model, for each length of the prompts.

    Returns:
        For each length, ascending: `length`, `prompts`, `kl` (nats a scored token), `agreement` (share of scored
        tokens whose likeliest token stays) and `holds`: the agreement is at most a hundredth below that of the
        shortest prompts.

    Raises:
        ValueError: A prediction is not finite.
    """
    found: list[dict[str, Any]] = []
    for length in sorted({len(prompt) for prompt in prompts}):
        some = [prompt for prompt in prompts if len(prompt) == length]
        kl, agreement = Divergence(model, some).agreement(plan)
        found.append({"length": length, "prompts": len(some), "kl": round(kl, 6), "agreement": round(agreement, 4)})
        found[-1]["holds"] = agreement >= found[0]["agreement"] - TOLERANCE
    return found
