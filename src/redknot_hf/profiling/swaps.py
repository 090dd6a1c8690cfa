"""Swaps: from a plan of drift's to a better one of the same bytes, led by gradients of the predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from redknot_hf.attention.dense import dense_attention
from redknot_hf.attention.devices import devices_of_layers
from redknot_hf.attention.watching import Attended, Call, watching
from redknot_hf.plan.plan import HeadPlan, HeadSpec

from .allocation import allocate
from .clock import Clock
from .divergence import Divergence
from .gates import checkpointed, frozen
from .holders import Holders
from .prompt import Prompt

_SHARE = 0.15  # of the heads may change in the first round
_ROUNDS = 24
_LARGE = 10**9  # parameters from which layers are computed again for the gradient, in place of being held
_PRICES = 24  # halvings in the search for the price of a change
Table = Float[np.ndarray, "heads choices"]
Picks = Int[np.ndarray, " heads"]


class SwapSearch:
    """Changes the choices of a plan while the KL falls on prompts that did not propose the change.

    A round asks one backward pass a prompt how the KL would move if a little of every other choice were mixed into
    every head. The changes that promise most for the bytes are made together, as many as the last rounds bore out, and
    stay if the KL on the other prompts falls.

    Args:
        model: The model.
        prompts: Two or more; every second one proposes, the others decide.
        choices: What a head may keep; everything is one choice more.
        costs: Bytes of every choice, everything included, of the heads that hold keys.
        squares: Squared drift of every choice, likewise.
        tick: Called with the forward passes done so far.

    Attributes:
        kl: Of the deciding prompts, after each change that was kept.
        finished: Whether the search had the time that it needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Prompt],
        choices: Sequence[HeadSpec],
        costs: Table,
        squares: Table,
        tick: Callable[[int], object],
    ) -> None:
        self.model, self.costs, self.squares, self.tick = model, costs, squares, tick
        self.choices, self.holders = (*choices, HeadSpec()), Holders.of(model.config)
        self.proposing, self.deciding = Divergence(model, prompts[::2]), Divergence(model, prompts[1::2])
        self.kl: list[float] = []
        self.finished = False

    def run(self, picks: Picks, budget: float, clock: Clock, reserve: float = 0.0) -> Picks:
        """The better choices.

        Args:
            picks: Where to begin.
            budget: Bytes of all heads together.
            clock: Ends the search, but for `reserve` seconds that are needed afterwards.
        """
        best, most = picks, max(1, round(_SHARE * len(picks)))
        self.kl = [self._measure(best)]
        slopes = None
        for _ in range(_ROUNDS):
            if not clock.left(reserve):
                return best
            slopes = self._slopes(best) if slopes is None else slopes
            proposed = self._proposal(best, slopes, budget, most)
            changed = int((proposed != best).sum())
            kl = self._measure(proposed) if changed else float("inf")
            if kl < self.kl[-1]:
                best, slopes = proposed, None
                self.kl.append(kl)
            elif changed > 2:
                most = changed // 2
            else:
                break
        self.finished = True
        return best

    def _measure(self, picks: Picks) -> float:
        found = float(self.deciding(self._plan(picks)).mean())
        self.tick(self.proposing.measured + self.deciding.measured)
        return found

    def _plan(self, picks: Picks) -> HeadPlan:
        return self.holders.plan([self.choices[pick] for pick in picks])

    def _proposal(self, picks: Picks, slopes: Table, budget: float, most: int) -> Picks:
        """The best choices for the budget by what they promise, at the least price a change that keeps to `most`.

        A slope tells what mixing in a little does. What a worse choice costs on top of it grows with its squared
        error, as the KL of the plan does with the sum of them.
        """
        stays = np.arange(slopes.shape[1]) == picks[:, None]
        mine = self.squares[np.arange(len(picks)), picks]
        worse = np.maximum(self.squares - mine[:, None], 0.0)
        promised = slopes + worse * self.kl[-1] / max(float(mine.sum()), np.finfo(float).tiny)
        low, high = 0.0, 2 * float(np.abs(promised).max()) + np.finfo(float).tiny
        best = picks
        for _ in range(_PRICES):
            price = (low + high) / 2
            found = allocate(self.costs, np.where(stays, 0.0, promised + price), budget)
            if (found != picks).sum() > most:
                low = price
            else:
                best, high = found, price
        return best

    def _slopes(self, picks: Picks) -> Table:
        """How the mean KL of the proposing prompts moves with the share of each choice that is mixed into a head."""
        total = np.zeros((len(picks), len(self.choices)))
        light = checkpointed if self.model.num_parameters() > _LARGE else frozen
        for i in range(len(self.proposing.prompts)):
            mixture = _Mixture(self.model, self._plan(picks), self.choices)
            with torch.enable_grad(), light(self.model), watching(self.model, mixture):
                self.proposing.loss(i).backward()
            total += self.holders.fold(mixture.slopes())
            self.tick(self.proposing.measured + self.deciding.measured)
        return total / len(self.proposing.prompts)


class _Mixture:
    """A watcher under which heads follow a plan, with nothing yet of every choice mixed in.

    Gradients flow through ordinary attention, which a plan is near to.
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

    def slopes(self) -> Table:
        """What the backward pass has found."""
        found = [share.grad if share.grad is not None else torch.zeros_like(share) for share in self.shares]
        return torch.cat([part.double().cpu() for part in found]).numpy()
