"""Questions about a tensor that touch no element."""

from torch import Tensor

_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_nested")
_METHODS = ("size", "dim", "numel", "stride", "element_size", "is_floating_point", "__len__")

METADATA = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES} | {getattr(Tensor, name) for name in _METHODS}
