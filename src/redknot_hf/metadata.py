"""Questions about a tensor, told from work with it."""

from typing import Any, cast

from torch import Tensor

_BASE = cast(Any, Tensor._base).__get__


def is_answer(func: Any, out: Any) -> bool:
    """Whether a call on a tensor returned what is known about it (shape, strides, what it is a view of).

    Compilers ask all kinds of questions of every tensor that they meet, so no list could name them.
    """
    if isinstance(out, Tensor):
        return func == _BASE
    return not (isinstance(out, (tuple, list)) and any(map(_is_tensor, out)))


def _is_tensor(part: Any) -> bool:
    return isinstance(part, Tensor)
