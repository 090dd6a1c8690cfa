"""What `RedKnotCache.update` returns in place of keys and values: a tensor that only the attention function opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import Step

# Questions about a tensor that touch no element.
_METADATA = frozenset({
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__,
})  # fmt: skip


class RedKnotHandle(torch.Tensor):
    """The new keys or values of one layer, on their way from `update` to the attention function.

    Models pass what `update` returns to the attention function untouched, so the handle carries the layer there. Shape,
    dtype and device can be asked; any other operation means that another attention implementation, or the model itself,
    reads keys that are not there, and raises.
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
        if func in _METADATA or func is Tensor.as_subclass:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(
            f"{getattr(func, '__name__', func)} was called on keys or values that a RedKnotCache holds, so the attention "
            "did not run through redknot. Call model.set_attn_implementation('redknot') before generating. If it is set, "
            "this model works on its cached keys outside of transformers' attention interface (MLA, ALiBi and the like) "
            "and cannot use a RedKnotCache."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"RedKnotHandle(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
