"""How far a plan moves what a model predicts: KL divergence from the unrestricted model, on prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from redknot_hf.plan import HeadPlan, HeadSpec

from .prompt import Prompt, evenly
from .watching import restricted, watching

_MOST = 256  # scored tokens of a prompt, evenly taken; each holds a distribution over the vocabulary


class Divergence:
    """Measures plans against the model without any, whose predictions it keeps.

    Args:
        model: The model.
        prompts: What to predict; of each, up to 256 scored tokens.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Prompt]) -> None:
        self.model = model
        self.prompts = prompts
        self.measured = 0
        dense = HeadPlan.uniform(model.config, HeadSpec())
        self.dense = [self._predict(dense, prompt) for prompt in prompts]

    def __call__(self, plan: HeadPlan, chosen: Sequence[int] | None = None) -> Float[np.ndarray, " prompts"]:
        """Mean KL(dense || plan) over the scored tokens of each prompt, in nats.

        Args:
            plan: Rule of every KV head.
            chosen: Which of the prompts; by default all.

        Raises:
            ValueError: A prediction is not finite.
        """
        chosen = range(len(self.prompts)) if chosen is None else chosen
        found = []
        for i in chosen:
            dense, mine = self.dense[i], self._predict(plan, self.prompts[i])
            found.append(float((dense.exp() * (dense - mine)).sum(-1).mean()))
        return np.maximum(found, 0.0)  # rounding

    def agreement(self, plan: HeadPlan) -> float:
        """Share of the scored tokens for which plan and dense model hold the same token the likeliest."""
        same = [
            dense.argmax(-1) == self._predict(plan, prompt).argmax(-1)
            for dense, prompt in zip(self.dense, self.prompts, strict=True)
        ]
        return float(torch.cat(same).float().mean())

    @torch.no_grad()
    def _predict(self, plan: HeadPlan, prompt: Prompt) -> Float[Tensor, "targets vocabulary"]:
        """Log-probabilities at the queries that predict scored tokens."""
        rows = (evenly(prompt.targets, _MOST) - 1).to(self.model.device)
        with watching(self.model, restricted(plan)):
            out = self.model(prompt.ids[None].to(self.model.device), use_cache=False, logits_to_keep=rows)
        self.measured += 1
        found = out.logits[0].float().log_softmax(-1)
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                f"the loss is not finite on a prompt of {len(prompt)} tokens: the model computes NaN or infinity in "
                f"{self.model.dtype}; load it in another dtype"
            )
        return found
