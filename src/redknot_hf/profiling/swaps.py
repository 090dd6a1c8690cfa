"""Swaps: from a plan to a better one of the same bytes, led by gradients of the predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from redknot_hf.plan.plan import HeadPlan, HeadSpec

from .allocation import allocate
from .clock import Clock
from .divergence import Divergence
from .fisher import able
from .holders import Holders
from .mixture import Mixture, mixed_in
from .prompt import Prompt, halves

_SHARE = 0.15  # of the heads may change in the first round
_ROUNDS = 24
_PRICES = 24  # halvings in the search for the price of a change
Table = Float[np.ndarray, "heads choices"]
Picks = Int[np.ndarray, " heads"]


class SwapSearch:
    """Changes the choices of a plan while the KL falls on prompts that did not propose the change.

    A round asks one backward pass a prompt how the KL would move if a little of every other choice were mixed into
    every head. The changes that promise most for the bytes are made together, as many as the last rounds bore out, and
    stay if the KL on the other prompts falls. Kinds of prompts that the model itself cannot do have no part in it, as
    in Fisher's errors: it is sure of none of their tokens, so their KL would be most of all.

    Args:
        model: The model.
        prompts: Two or more; half of every kind proposes, the other half decides.
        choices: What a head may keep; everything is one choice more.
        costs: Bytes of every choice, everything included, of the heads that hold keys.
        errors: Of every choice, likewise; those of a plan add up.
        tick: Called with the forward passes done so far.

    Attributes:
        divergence: Of all prompts.
        proposing: Which of them propose.
        deciding: Which of them decide.
        kl: Of the deciding prompts, after each change that was kept.
        finished: Whether the search had the time that it needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Prompt],
        choices: Sequence[HeadSpec],
        costs: Table,
        errors: Table,
        tick: Callable[[int], object],
    ) -> None:
        self.model, self.costs, self.errors, self.tick = model, costs, errors, tick
        self.choices, self.holders = (*choices, HeadSpec()), Holders.of(model.config)
        self.divergence, kinds = Divergence(model, prompts), [prompt.kind for prompt in prompts]
        kept = np.flatnonzero(able(self.divergence.right(), kinds))
        kept = kept if len(kept) > 1 else np.arange(len(prompts))
        self.proposing, self.deciding = (kept[half].tolist() for half in halves([kinds[i] for i in kept]))
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
        found = float(self.divergence(self._plan(picks), self.deciding).mean())
        self.tick(self.divergence.measured)
        return found

    def _plan(self, picks: Picks) -> HeadPlan:
        return self.holders.plan([self.choices[pick] for pick in picks])

    def _proposal(self, picks: Picks, slopes: Table, budget: float, most: int) -> Picks:
        """The best choices for the budget by what they promise, at the least price a change that keeps to `most`.

        A slope tells what mixing in a little does. What a worse choice costs on top of it grows with its error, as the
        KL of the plan does with the sum of them.
        """
        stays = np.arange(slopes.shape[1]) == picks[:, None]
        mine = self.errors[np.arange(len(picks)), picks]
        worse = np.maximum(self.errors - mine[:, None], 0.0)
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
        for i in self.proposing:
            mixture = Mixture(self.model, self._plan(picks), self.choices)
            with mixed_in(self.model, mixture):
                self.divergence.loss(i).backward()
            total += self.holders.fold(mixture.slopes())
            self.tick(self.divergence.measured)
        return total / len(self.proposing)
