"""The attention function `"redknot"`: writes a step to the cache and attends over what every head keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import AttentionInterface

from redknot_hf.cache.handle import RedKnotHandle
from redknot_hf.cache.step import Output, Query, Step

from .dense import dense_attention
from .explicit import explicit_attention
from .mask import PaddingMask, describes_new_tokens, real_tokens

_NOTHING = nullcontext()


def redknot_attention(
    module: nn.Module,
    query: Query,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Output, None]:
    """Attends with a RedKnotCache where there is one, and as any model does where there is none.

    The signature is transformers'. With a cache, `key` and `value` are handles: the new tokens are written to the rows
    (once, also if several layers share them), and every query sees what its head's rule says. No gradient flows
    through the cache.

    Raises:
        ValueError: Weights, dropout, a position bias or two-sided attention are asked of a cache.
    """
    if kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False)):
        raise ValueError(
            "output_attentions=True: the redknot attention never holds the weights. Load the model with "
            "attn_implementation='eager' to look at them."
        )
    options = attention_options(query, scaling, kwargs)
    if not isinstance(key, RedKnotHandle):
        return dense_attention(module, query, key, value, attention_mask, dropout, kwargs, **options), None
    _refuse(module, dropout, kwargs)
    step = key.redknot
    if torch.compiler.is_compiling():
        if step.captured is not None:
            return step.captured(step, query, options), None
        plain = attention_mask is None or describes_new_tokens(attention_mask, step.tokens)
        # Where a layer shares the keys, several tokens with padding among them are not the last of their rows.
        level = not step.written or attention_mask is None or step.tokens == 1
        level &= query.device == step.value.device
        if step.attend is None and plain and level and step.storage.captures(step.tokens):
            return step.storage.captured(step, query, attention_mask, options), None
        return _attend_eagerly(query, step, attention_mask, options), None  # pyright: ignore
    return _attend(query, step, attention_mask, options), None


def attention_options(query: Tensor, scaling: float | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns scale, softcap and logits of the sink, as the kernels take them.

    Args:
        query: Any; the scale is by its last dimension unless the model says one.
        scaling: The model's.
        asked: What else came with the call, by transformers' names.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return {"scale": scale, "softcap": asked.get("softcap"), "s_aux": asked.get("s_aux")}


def _attend(query: Query, step: Step, mask: Tensor | None, options: dict[str, Any]) -> Output:
    query = query.to(step.value.dtype)  # under autocast RoPE leaves it wider
    if query.device != step.value.device:
        return _attend_there(query, step, mask, options)
    with _plainly(query.device.type):
        if step.attend is not None:
            out = step.attend(step, query, mask, options)
        elif mask is None or _only_padding(mask, step):
            out = step.storage.attend(step, query, _real(step, mask), options)
        else:
            out = explicit_attention(query, step, mask, options)
    return _NoGradient.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out


def _attend_there(query: Query, step: Step, mask: Tensor | None, options: dict[str, Any]) -> Output:
    """Attends where the rows are, for a layer of another device that shares them: its queries are the smaller part."""
    home = step.value.device
    moved = {name: x.to(home) if isinstance(x, Tensor) else x for name, x in options.items()}
    return _attend(query.to(home), step, None if mask is None else mask.to(home), moved).to(query.device)


@torch.compiler.disable(reason="the host does the bookkeeping of this step of a RedKnotCache")  # pyright: ignore
def _attend_eagerly(query: Query, step: Step, mask: Tensor | None, options: dict[str, Any]) -> Output:
    return _attend(query, step, mask, options)


def _only_padding(mask: Tensor, step: Step) -> bool:
    """Whether a mask speaks of padding; one that speaks of a step's tokens alone is for steps that may be captured."""
    return isinstance(mask, PaddingMask) or (step.storage.compileable and describes_new_tokens(mask, step.tokens))


def _real(step: Step, mask: Tensor | None) -> Bool[Tensor, "batch tokens"] | None:
    """Which tokens of a step are no padding, `None` if all; of one that is written that is known."""
    if mask is None or step.written:
        return None
    if isinstance(mask, PaddingMask):
        return mask.new_tokens(step.start, step.tokens, step.storage.rows.lengths)
    return real_tokens(mask)


@contextmanager
def _without_gradients_and_autocast(device_type: str) -> Iterator[None]:
    on = torch.is_autocast_enabled(device_type)
    with torch.no_grad(), torch.autocast(device_type, enabled=False) if on else _NOTHING:
        yield


def _plainly(device_type: str) -> AbstractContextManager[None]:
    """Keeps gradients and autocast out of kernels, which choose their own precision; free where both are off."""
    needed = torch.is_grad_enabled() or torch.is_autocast_enabled(device_type)
    return _without_gradients_and_autocast(device_type) if needed else _NOTHING


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(f"dropout={dropout} with a RedKnotCache: call model.eval(), or train with use_cache=False")
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias, which a RedKnotCache cannot; use DynamicCache"
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{type(module).__name__} attends both ways and needs no RedKnotCache; use DynamicCache")


class _NoGradient(torch.autograd.Function):
    """Lets a forward pass run outside of `no_grad`, and stops whoever would train through it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError("gradients do not flow through a RedKnotCache: train with use_cache=False")


AttentionInterface.register("redknot", redknot_attention)
