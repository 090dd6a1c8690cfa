"""A model's heads with a little of every choice mixed in: what its predictions make of that is a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from redknot_hf.attention.dense import dense_attention
from redknot_hf.attention.devices import devices_of_layers
from redknot_hf.attention.watching import Attended, Call, watching
from redknot_hf.plan.plan import HeadPlan, HeadSpec

from .gates import checkpointed, frozen

_LARGE = 10**9  # parameters from which layers are computed again for the gradient, in place of being held


class Mixture:
    """A watcher under which heads follow a plan, with nothing yet of every choice mixed in.

    Gradients flow through ordinary attention, which a plan is near to.

    Args:
        model: Runs under it (`mixed_in`).
        plan: What the heads do.
        choices: What is mixed into each.
    """

    def __init__(self, model: PreTrainedModel, plan: HeadPlan, choices: Sequence[HeadSpec]) -> None:
        self.plan, self.choices = plan, choices
        self.shares = [
            torch.zeros(len(layer), len(choices), device=device, requires_grad=True)
            for layer, device in zip(plan, devices_of_layers(model, len(plan)), strict=True)
        ]

    def __call__(self, call: Call) -> Attended:
        whole = dense_attention(
            call.module, call.query, call.key, call.value, None, 0.0, {"sliding_window": call.reach}, **call.options
        )
        with torch.no_grad():
            mine = call.attend(self.plan[call.layer])
            others = [call.attend((spec,) * call.heads) - mine for spec in self.choices]
        out = whole + (mine - whole).detach()
        group = whole.shape[2] // call.heads
        for choice, other in enumerate(others):
            share = self.shares[call.layer][:, choice].repeat_interleave(group)[:, None].to(out.dtype)
            out = out + share * other
        return out

    def slopes(self) -> Float[np.ndarray, "heads choices"]:
        """How what backward passes were of moves with every share; they begin anew."""
        found = [share.grad if share.grad is not None else torch.zeros_like(share) for share in self.shares]
        for share in self.shares:
            share.grad = None
        return torch.cat([part.double().cpu() for part in found]).numpy()


@contextmanager
def mixed_in(model: PreTrainedModel, mixture: Mixture) -> Iterator[None]:
    """The model runs under a mixture, for forward and backward passes, for the duration."""
    light = checkpointed if model.num_parameters() > _LARGE else frozen
    with torch.enable_grad(), light(model), watching(model, mixture):
        yield
