"""How far a plan moves what a model predicts: KL divergence from the unrestricted model, on prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from redknot_hf.attention.devices import input_device
from redknot_hf.attention.watching import blocks, forwards_restored, restricted, watching
from redknot_hf.plan.plan import HeadPlan, HeadSpec

from .prompt import Prompt, evenly

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
        self.settled: tuple[HeadPlan, list[list[Any]]] | None = None
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
        return np.array([self._compare(plan, i)["kl"] for i in chosen])

    def compare(self, plan: HeadPlan) -> list[dict[str, float]]:
        """Means over the scored tokens of each prompt.

        Returns:
            `kl`; `agreement`, how often the likeliest token stays; `accuracy` and `dense_accuracy`, how often it is
            that of the prompt.
        """
        return [self._compare(plan, i) for i in range(len(self.prompts))]

    def right(self) -> Float[np.ndarray, " prompts"]:
        """Share of each prompt's scored tokens that the unrestricted model predicts right."""
        return np.array([
            float((said.argmax(-1).cpu() == prompt.ids[scored_targets(prompt)].cpu()).float().mean())
            for said, prompt in zip(self.dense, self.prompts, strict=True)
        ])  # fmt: skip

    def settle(self, plan: HeadPlan, chosen: Sequence[int] | None = None) -> None:
        """Keeps the streams between the layers under a plan, so that plans like it need only the layers that differ.

        They take as much memory as the hidden states of all layers, for each chosen prompt.
        """
        self.settled = None
        kept: list[list[Any]] = [[] for _ in self.prompts]
        for i in range(len(self.prompts)) if chosen is None else chosen:
            hooks = [
                block.register_forward_hook(lambda module, args, output, found=kept[i]: found.append(output))
                for block in blocks(self.model)
            ]
            try:
                self._predict(plan, self.prompts[i])
            finally:
                for hook in hooks:
                    hook.remove()
        self.settled = plan, kept

    def _compare(self, plan: HeadPlan, prompt: int) -> dict[str, float]:
        with self._from_where_it_differs(plan, prompt):
            dense, mine = self.dense[prompt], self._predict(plan, self.prompts[prompt])
        expected = self.prompts[prompt].ids[scored_targets(self.prompts[prompt])].to(mine.device)
        likeliest, was = mine.argmax(-1), dense.argmax(-1)
        same = {"agreement": likeliest == was, "accuracy": likeliest == expected, "dense_accuracy": was == expected}
        kl = float((dense.exp() * (dense - mine)).sum(-1).mean())
        # Rounding may make it negative.
        return {"kl": max(kl, 0.0)} | {name: float(flags.float().mean()) for name, flags in same.items()}

    def loss(self, prompt: int) -> Float[Tensor, ""]:
        """Mean KL of one prompt, differentiable, of the model as it is being watched."""
        dense, mine = self.dense[prompt], self._forward(self.prompts[prompt])
        return (dense.exp() * (dense - mine)).sum(-1).mean()

    @contextmanager
    def _from_where_it_differs(self, plan: HeadPlan, prompt: int) -> Iterator[None]:
        """Lets the layers below the first that differs hand on what was kept, for the duration."""
        settled, kept = self.settled or (plan, [[]] * len(self.prompts))
        same = next((i for i, (a, b) in enumerate(zip(plan, settled, strict=True)) if a != b), len(plan))
        skipped = blocks(self.model)[:same] if kept[prompt] else []
        with forwards_restored(skipped):
            for block in skipped:
                block.forward = lambda *args, found=kept[prompt][same - 1], **kwargs: found
            yield

    @torch.no_grad()
    def _predict(self, plan: HeadPlan, prompt: Prompt) -> Float[Tensor, "targets vocabulary"]:
        """Log-probabilities at the queries that predict scored tokens."""
        with watching(self.model, restricted(plan)):
            found = self._forward(prompt)
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                f"the loss is not finite on a prompt of {len(prompt)} tokens: the model computes NaN or infinity in "
                f"{self.model.dtype}; load it in another dtype"
            )
        return found

    def _forward(self, prompt: Prompt) -> Float[Tensor, "targets vocabulary"]:
        self.measured += 1
        return predictions(self.model, prompt)


def scored_targets(prompt: Prompt) -> Int[Tensor, " targets"]:
    """Places of the scored tokens of a prompt that are looked at."""
    return evenly(prompt.targets, _MOST)


def predictions(model: PreTrainedModel, prompt: Prompt) -> Float[Tensor, "targets vocabulary"]:
    """Log-probabilities at the queries that predict them, of the model as it is being watched."""
    device = input_device(model)
    rows = (scored_targets(prompt) - 1).to(device)
    out = model(prompt.ids[None].to(device), use_cache=False, logits_to_keep=rows)
    return out.logits[0].float().log_softmax(-1)
