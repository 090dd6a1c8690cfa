"""Drift: how far a head's window moves the residual stream, measured as the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from redknot_hf.attention.devices import input_device, weight_of
from redknot_hf.attention.watching import Attended, Call, attention_layers, blocks, read_whole, watching
from redknot_hf.plan.plan import HeadSpec

from .prompt import Prompt

# What queries all over a text weigh beside those that predict its scored tokens: some heads do their work where a text
# is read, so that an answer finds it done. On the bundled model both together find its heads more surely than either.
READING = 0.1
# Of a text every so many queries, evenly spaced, stand for all; but no fewer and no more than these.
_EVERY, _FEWEST, _MOST = 7, 256, 1024


def measure_drift(
    model: PreTrainedModel, prompts: Sequence[Prompt], choices: Sequence[HeadSpec], tick: Callable[[], bool]
) -> Float[np.ndarray, "prompts heads choices 2 2"]:
    """Measures each prompt: squared relative errors of every head under every choice, summed, and their number.

    Both are told apart for the queries that predict the prompt's scored tokens, and for queries all over it.

    The error is that of the head's contribution to the residual stream, after `o_proj`, when its attention keeps to
    the choice. It is relative to the stream that the attention's output has been added to, query by query, as
    what reads the stream norms it. One forward pass serves all heads and choices, and every layer sees the stream of
    the unrestricted model.

    Args:
        tick: Called after each prompt; where it says so, the prompts left are not measured.

    Raises:
        ValueError: A layer of the model has no output projection, or a number is not finite.
    """
    found = []
    for prompt in prompts:
        meter = _Meter(choices, _queries(prompt), len(prompt.targets), input_device(model))
        with torch.no_grad(), meter.listening(model), watching(model, meter):
            read_whole(model, prompt.ids[None].to(input_device(model)))
        found.append(meter.result())
        if tick():
            break
    return np.stack(found)


def drift(
    sums: Float[np.ndarray, "prompts heads choices 2 2"], kinds: Sequence[str]
) -> Float[np.ndarray, "heads choices"]:
    """The drift over some prompts: root of the mean squared relative error, queries all over weighing `READING`.

    Kinds count alike, and within a kind the queries do, of whichever prompt: one that scores little says little.

    Args:
        sums: As `measure_drift` gives them.
        kinds: Of the prompts.
    """
    of_kinds = [sums[[kind == one for kind in kinds]].sum(0) for one in dict.fromkeys(kinds)]
    errors, number = np.moveaxis(np.stack(of_kinds), -1, 0)
    scored, reading = np.moveaxis((errors / number).mean(0), -1, 0)
    return np.sqrt((scored + READING * reading) / (1 + READING))


def _queries(prompt: Prompt) -> Int[Tensor, " rows"]:
    """Places of the queries that predict scored tokens, and then of those that stand for the whole text."""
    queries = len(prompt.ids) - 1
    read = min(queries, _MOST, max(_FEWEST, -(-queries // _EVERY)))
    return torch.cat([prompt.targets - 1, torch.linspace(0, queries - 1, read).round().long()])


class _Meter:
    """Watches one forward pass.

    Args:
        rows: Queries to measure at.
        scored: How many of them, the first, predict scored tokens.
        device: Where the pass begins.
    """

    def __init__(
        self, choices: Sequence[HeadSpec], rows: Int[Tensor, " rows"], scored: int, device: torch.device
    ) -> None:
        self.choices = choices
        self.scored = scored
        ascending = rows.argsort()
        self.asked = tuple(rows[ascending].tolist())
        self.rows, self.ascending, self.order = (x.to(device) for x in (rows, ascending, ascending.argsort()))
        self.errors: dict[int, Float[Tensor, "choices heads rows"]] = {}
        self.sums: dict[int, Float[Tensor, "heads choices 2 2"]] = {}

    def __call__(self, call: Call) -> Attended:
        whole = call.attend((HeadSpec(),) * call.heads)
        kept, gram = whole[0, self.rows[self.ascending]], _gram(call)
        errors = [_projected(kept - call.attend((spec,) * call.heads, self.asked)[0], gram) for spec in self.choices]
        self.errors[call.layer] = torch.stack(errors)[..., self.order]
        return whole

    @contextmanager
    def listening(self, model: PreTrainedModel) -> Iterator[None]:
        """Hears, for the duration, what each layer's attention adds to the stream."""
        with ExitStack() as stack:
            for block, (_, module) in zip(blocks(model), attention_layers(model), strict=True):
                self._listen(block, module, stack)
            yield

    def _listen(self, block: nn.Module, attention: nn.Module, stack: ExitStack) -> None:
        """After its attention, a block may scale or norm the output, adds it, and hands the sum to its next module.

        So the first module that is given neither the output nor what another one made of it, is given the stream.
        """
        seen: dict[str, Any] = {}

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen["before"] = args[0] if args else kwargs["hidden_states"]

        def attended(module: nn.Module, args: Any, output: Any) -> None:
            seen["output"] = seen["last"] = output[0]

        def child(module: nn.Module, args: Any, output: Any) -> None:
            if "output" not in seen:
                return
            if args[0] is seen["last"]:
                seen["last"] = output
            else:
                self._settle(attention, args[0], **seen)
                seen.clear()

        hooks = [block.register_forward_pre_hook(enter, with_kwargs=True), attention.register_forward_hook(attended)]
        hooks += [module.register_forward_hook(child) for module in block.children() if module is not attention]
        for hook in hooks:
            stack.callback(hook.remove)

    def _settle(self, attention: nn.Module, stream: Tensor, before: Tensor, output: Tensor, last: Tensor) -> None:
        """Scales a layer's errors as its block has scaled the attention's output, and sums them up."""
        layer: Any = attention.layer_idx
        squares = [_squares(x[0, self.rows]) for x in (stream, stream.float() - before.float(), output)]
        held, added, projected = squares
        scale = added / projected.clamp(min=torch.finfo(torch.float32).tiny)
        moved = self.errors.pop(layer) * scale
        # A stream of zeros that nothing moves has not drifted.
        parts = (moved / held.where(moved > 0, 1)).double().tensor_split((self.scored,), -1)
        sums = torch.stack([part.sum(-1).T for part in parts], -1)
        counts = sums.new_tensor([part.shape[-1] for part in parts]).expand_as(sums)
        self.sums[layer] = torch.stack([sums, counts], -1)

    def result(self) -> Float[np.ndarray, "heads choices 2 2"]:
        """The sums of all heads, layer by layer."""
        if self.errors or not self.sums:
            raise ValueError(f"layers {sorted(self.errors)} do not add their attention's output to a residual stream")
        sums = torch.cat([self.sums[layer] for layer in sorted(self.sums)]).cpu().numpy()
        if not np.isfinite(sums).all():
            raise ValueError("the drift is not finite: the model computes NaN or infinity on this prompt in its dtype")
        return sums


def _gram(call: Call) -> Float[Tensor, "heads inner inner"]:
    """Products of the columns of `o_proj` that a KV head's group of query heads goes through."""
    with weight_of(call.module.get_submodule("o_proj")) as weight:
        columns = weight.unflatten(1, (call.heads, -1)).permute(1, 2, 0).float()
    return columns @ columns.mT


def _projected(
    error: Float[Tensor, "rows query_heads dim"], gram: Float[Tensor, "heads inner inner"]
) -> Float[Tensor, "heads rows"]:
    """Squared length of each KV head's error behind `o_proj`; its group of query heads is restricted together.

    By the columns' products it takes as many steps as the group has dims, and not the stream.
    """
    parts = error.unflatten(1, (len(gram), -1)).flatten(2).transpose(0, 1).float()
    return ((parts @ gram) * parts).sum(-1).clamp(min=0)  # rounding may make it negative


def _squares(tensor: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
    return tensor.float().pow(2).sum(-1)
