"""Fisher: what each choice costs the predictions, to second order, by gradients of answers the model would give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from redknot_hf.plan.plan import HeadPlan, HeadSpec

from .divergence import predictions, scored_targets
from .mixture import Mixture, mixed_in
from .prompt import Prompt

_DRAWN = 8  # answers that are drawn for every prompt, a backward pass each
# A kind of prompts of which the model predicts less than this share right is left out: its own predictions are worth
# nothing there, and as it is sure of none, they move the most.
_ABLE = 0.1
_FREE_TEXT = "text"

Found = tuple[Float[np.ndarray, "prompts heads choices"], Float[np.ndarray, " prompts"]]


def measure_fisher(
    model: PreTrainedModel, prompts: Sequence[Prompt], choices: Sequence[HeadSpec], tick: Callable[[], bool]
) -> Found:
    """Measures each prompt: half the squared slope of answers' log-probability along what a choice does to a head.

    The KL divergence from the model has neither value nor slope where nothing is restricted; its curvature is the
    Fisher matrix, the mean square of the slopes of answers that are drawn from the model's predictions. Of the matrix
    only the diagonal is estimated: errors of heads add up as if they were independent. What a choice does to a head is
    taken over all tokens of the text together, so what cancels out on the way to an answer counts for nothing.

    Args:
        tick: Called after each prompt; where it says so, the prompts left are not measured.

    Returns:
        In nats a scored token, of every head under every choice; and the share of each prompt's scored tokens that the
        model predicts right.

    Raises:
        ValueError: A number is not finite.
    """
    dense, found, right = HeadPlan.uniform(model.config, HeadSpec()), [], []
    for number, prompt in enumerate(prompts):
        mixture = Mixture(model, dense, choices)
        with mixed_in(model, mixture):
            said = _finite(predictions(model, prompt), model)
            squares = [mixture.slopes() ** 2 for _ in _answers(said, number)]
        found.append(np.mean(squares, 0) / (2 * len(said)))
        expected = prompt.ids[scored_targets(prompt)].to(said.device)
        right.append(float((said.argmax(-1) == expected).float().mean()))
        if tick():
            break
    return np.stack(found), np.array(right)


def fisher(found: Found, kinds: Sequence[str]) -> Float[np.ndarray, "heads choices"]:
    """The error over some prompts, which count alike, but for kinds that the model itself cannot do at all."""
    errors, right = found
    return errors[able(right, kinds)].mean(0)


def able(right: Float[np.ndarray, " prompts"], kinds: Sequence[str]) -> Bool[np.ndarray, " prompts"]:
    """Which prompts are of kinds that the model can do, by the share of each that it predicts right; else all."""
    names = np.array(kinds)
    found = np.array([kind == _FREE_TEXT or right[names == kind].mean() >= _ABLE for kind in kinds])
    return found if found.any() else ~found


def _finite(said: Float[Tensor, "targets vocabulary"], model: PreTrainedModel) -> Float[Tensor, "targets vocabulary"]:
    if not bool(torch.isfinite(said).all()):
        raise ValueError(f"the model computes NaN or infinity on a prompt in {model.dtype}: load it in another dtype")
    return said


def _answers(said: Float[Tensor, "targets vocabulary"], seed: int) -> Iterator[None]:
    """Draws answers, and yields after the backward pass of each."""
    generator = torch.Generator(said.device).manual_seed(seed)
    drawn = torch.multinomial(said.detach().exp(), _DRAWN, replacement=True, generator=generator)
    for i in range(_DRAWN):
        said.gather(1, drawn[:, i : i + 1]).sum().backward(retain_graph=i + 1 < _DRAWN)
        yield
