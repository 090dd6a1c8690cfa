"""What `RedKnotCache.update` returns for keys and values: a tensor that only the attention function opens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from redknot_kernels import Context
from torch import Tensor

if TYPE_CHECKING:
    from .layer import RedKnotLayer

BROKEN_OFF = (
    "the layers of the cache hold different numbers of tokens: a forward pass broke off between them. Call "
    "cache.reset() and read the text again."
)

_BASE = cast(Any, Tensor._base).__get__


@dataclass
class Run:
    """Tokens of a step that are attended together: of all sequences, or the real ones of a single sequence.

    Attributes:
        sequences: Which sequences.
        real: Indices of the tokens that are no padding; `None` if all.
        context: The past as it was before the step, if the step is too long to be read back from the pages.
    """

    sequences: slice
    real: Int[Tensor, " tokens"] | None
    context: Context | None = None

    def take(self, tensor: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "run heads run_tokens dim"]:
        """The run's part of a tensor over the whole step."""
        tensor = tensor[self.sequences]
        return tensor if self.real is None else tensor.index_select(2, self.real)


@dataclass
class Step:
    """The new tokens of one forward pass through one layer.

    Attributes:
        layer: Where they go.
        start: Slots of the cache before them.
        written: The layer has taken them.
        real: Which of them are no padding; `None` if all.
        runs: Which of them are attended together, where they are not attended as they are written.
        past: What the rows held before, where whoever attends asked for it.
        attend: Writes and attends the step in place of the attention function: takes it, queries, mask and options.
        said: What the cache's config calls the model's attention implementation.
    """

    layer: RedKnotLayer
    key: Float[Tensor, "batch heads tokens key_dim"]
    value: Float[Tensor, "batch heads tokens value_dim"]
    start: int
    written: bool = False
    real: Bool[Tensor, "batch tokens"] | None = None
    runs: list[Run] = field(default_factory=list)
    past: Any = None
    attend: Callable[..., Tensor] | None = None
    said: str | None = None

    @property
    def tokens(self) -> int:
        """Slots of the step, padding included."""
        return self.key.shape[2]


class RedKnotHandle(torch.Tensor):
    """The new keys or values of one layer, on their way from `update` to the attention function.

    Models pass what `update` returns to the attention function untouched, so the handle carries the layer there.
    Shape, dtype and device can be asked, and a move to the same device changes nothing. Any other operation means that
    another attention implementation, or the model itself, reads keys that are not there, and raises.
    """

    redknot: Step

    @staticmethod
    def wrap(tensor: Tensor, step: Step) -> RedKnotHandle:
        """Makes a handle of the new keys or values."""
        handle = tensor.as_subclass(RedKnotHandle)
        handle.redknot = step
        return handle

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **(kwargs or {}))
        except RuntimeError as error:  # a mask over all tokens, say, does not fit the new keys
            raise _misread(func, (*args, *(kwargs or {}).values())) from error
        if func is Tensor.as_subclass or is_answer(func, out):
            return out
        if func is Tensor.to and out is args[0]:  # layers that share keys see to it that they are on their own device
            return args[0]
        raise _misread(func, (*args, *(kwargs or {}).values()))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"RedKnotHandle(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _misread(func: Any, given: tuple[Any, ...]) -> Exception:
    """The error for keys that something else than the attention function reads."""
    said = next((one.redknot.said for one in given if isinstance(one, RedKnotHandle)), None)
    if said not in (None, "redknot"):
        return ValueError(
            f"the model runs with attn_implementation={said!r}, which cannot read a RedKnotCache. Call "
            "model.set_attn_implementation('redknot'), or load the model with attn_implementation='redknot'. A "
            "model that refuses both does not use transformers' attention interface; use DynamicCache with it."
        )
    return RuntimeError(
        f"{getattr(func, '__name__', func)} was called on keys or values that a RedKnotCache holds, so the "
        "attention did not run through redknot. Call model.set_attn_implementation('redknot') before generating. "
        "If it is set, this model works on its cached keys outside of transformers' attention interface (MLA, "
        "ALiBi and the like) and cannot use a RedKnotCache; use DynamicCache."
    )


def is_answer(func: Any, out: Any) -> bool:
    """Whether a call on a tensor returned what is known about it (shape, strides, what it is a view of).

    Compilers ask all kinds of questions of every tensor that they meet, so no list could name them.
    """
    if isinstance(out, Tensor):
        return func == _BASE
    return not (isinstance(out, (tuple, list)) and any(map(_is_tensor, out)))


def _is_tensor(part: Any) -> bool:
    return isinstance(part, Tensor)
