"""What `RedKnotCache.update` returns for keys and values: a tensor that only the attention function opens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .step import Step

_BASE = cast(Any, Tensor._base).__get__


class RedKnotHandle(torch.Tensor):
    """The new keys or values of one layer, on their way from `update` to the attention function.

    Models pass what `update` returns to the attention function untouched, so the handle carries the layer there.
    Shape, dtype and device can be asked. Moved to another device, where a layer shares the keys, it is a handle of the
    same step, whose rows stay where they are. Any other operation means that another attention implementation, or the
    model itself, reads keys that are not there, and raises.
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
        if func is Tensor.to and out.dtype == args[0].dtype:  # layers that share keys want them on their own device
            return args[0] if out is args[0] else RedKnotHandle.wrap(out, args[0].redknot)
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
