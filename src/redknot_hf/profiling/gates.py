"""Gates: how much of each head's far attention the model itself asks to keep (DuoAttention, arXiv 2410.10819).

A gate mixes a head's full output with its windowed one. The gates are trained, and nothing else, so that the mixed
model predicts what the model predicts, at a price for every open gate. Ours differ in three points: the loss is the KL
divergence at scored tokens, gates are sigmoids so that no two tie at a bound, and each half of the prompts trains its
own, so that they can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from redknot_kernels import implementation
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from redknot_hf.attention.dense import dense_attention
from redknot_hf.attention.devices import input_device
from redknot_hf.attention.watching import Attended, Call, blocks, forwards_restored, watching
from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.per_layer import kv_heads
from redknot_hf.plan.plan import HeadSpec
from redknot_hf.plan.rules import head_rules

from .divergence import Divergence
from .prompt import Prompt, fingerprint, halves

RATE = 0.1  # of Adam, falling to a tenth
PRICE = 0.1  # of the mean gate, in nats
OPEN = 2.0  # where all gates begin: sigmoid(2) = 0.88
_SAVE_SECONDS = 20


class Gates:
    """The gates of one half of the prompts, and their training.

    Args:
        divergence: Prompts, and what the unrestricted model predicts on them.
        spec: What a closed gate leaves.
        chosen: Which of the prompts.
    """

    def __init__(self, divergence: Divergence, spec: HeadSpec, chosen: Sequence[int]) -> None:
        self.divergence, self.spec, self.chosen = divergence, spec, chosen
        model = divergence.model
        self.shape = kv_heads(model.config)
        self.logits = torch.full((sum(self.shape),), OPEN, device=input_device(model), requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=RATE)
        self.step = 0

    def train(self, steps: int, tick: Callable[[], object], until: float | None = None) -> Iterator[None]:
        """Trains up to this step, and yields after each.

        Args:
            steps: Steps in all, those of earlier calls included.
            tick: Called after each.
            until: Time (`perf_counter`) to stop at.

        Raises:
            ValueError: The loss is not finite.
        """
        while self.step < steps and not (until is not None and time.perf_counter() > until):
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * (1 - 0.9 * self.step / steps)
            prompt = self.chosen[self.step % len(self.chosen)]
            with torch.enable_grad(), checkpointed(self.divergence.model), watching(self.divergence.model, self):
                loss = self.divergence.loss(prompt) + PRICE * self.logits.sigmoid().mean()
                if not bool(torch.isfinite(loss)):
                    raise ValueError("the loss of the gates is not finite: load the model in another dtype")
                self.optimizer.zero_grad()
                loss.backward()  # layers are computed again, and watched again
            self.optimizer.step()
            self.step += 1
            tick()
            yield

    def __call__(self, call: Call) -> Attended:
        """The mixed output of a layer, differentiable."""
        whole = dense_attention(
            call.module, call.query, call.key, call.value, None, 0.0, {"sliding_window": call.reach}, **call.options
        )
        rules = head_rules((self.spec,) * call.heads, 64, call.reach, 0)
        # Written in operations that all have a derivative.
        near = implementation("torch").prefill(call.query, call.key, call.value, None, rules, **call.options)
        first = sum(self.shape[: call.layer])
        gate = self.logits[first : first + call.heads].sigmoid().to(whole.dtype)
        gate = gate.repeat_interleave(whole.shape[2] // call.heads)[:, None]
        return gate * whole + (1 - gate) * near

    def state(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {"logits": self.logits.detach().cpu(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def train_gates(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    spec: HeadSpec,
    steps: int,
    tick: Callable[[], object],
    *,
    seconds: float | int | None = None,
    path: AnyPath | None = None,
) -> list[Float[np.ndarray, " heads"]]:
    """Trains the gates of either half of the prompts.

    Args:
        steps: Optimizer steps for each half, of one prompt each.
        tick: Called after each step.
        seconds: Time to stop after.
        path: File to keep the training in: a run that finds it goes on from there.

    Returns:
        The gates of each half, from 0, which the window serves as well, to 1.

    Raises:
        ValueError: The file is of another model, of other prompts or another window; or the loss is not finite.
    """
    until = None if seconds is None else time.perf_counter() + seconds
    key = [model.config.name_or_path, fingerprint(prompts), spec.window, spec.sink]
    divergence = Divergence(model, prompts)
    both = [Gates(divergence, spec, half) for half in halves([prompt.kind for prompt in prompts])]
    if path is not None and Path(path).exists():
        saved = torch.load(path, weights_only=True)
        if saved["key"] != key:
            raise ValueError(f"{path}: holds gates of {saved['key']}, not of {key}; give another file")
        for gates, state in zip(both, saved["halves"], strict=True):
            gates.resume(state)
    saved_at = time.perf_counter()
    # In turns, so that time that runs out runs out for both.
    for _ in _in_turns(*(gates.train(steps, tick, until) for gates in both)):
        if path is not None and time.perf_counter() - saved_at > _SAVE_SECONDS:
            torch.save({"key": key, "halves": [gates.state() for gates in both]}, path)
            saved_at = time.perf_counter()
    if path is not None:
        torch.save({"key": key, "halves": [gates.state() for gates in both]}, path)
    return [gates.logits.detach().sigmoid().double().cpu().numpy() for gates in both]


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Layers forget what they compute and compute it again for the gradient, for the duration.

    The weights ask for no gradient meanwhile.
    """
    layers = blocks(model)
    with forwards_restored(layers), frozen(model):
        for block in layers:
            block.forward = lambda *args, _forward=block.forward, **kwargs: checkpoint(
                _forward, *args, use_reentrant=False, **kwargs
            )
        yield


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """The weights ask for no gradient, for the duration."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _in_turns(first: Iterator[None], second: Iterator[None]) -> Iterator[None]:
    running = [first, second]
    while running:
        for each in list(running):
            try:
                yield next(each)
            except StopIteration:
                running.remove(each)
