"""The implementations of the kernels, by name: they share signatures, and a named one runs or raises."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from .decode import decode
from .pages import append
from .prefill import prefill

NAMES = ("torch", "triton")


class Kernels(NamedTuple):
    """One implementation: `append`, `decode` and `prefill`, with the arguments of their plain versions."""

    append: Callable
    decode: Callable
    prefill: Callable


def implementation(name):
    """The kernels of this name.

    Raises:
        ValueError: There is no implementation of this name.
        ImportError: It needs Triton, which is not installed.
    """
    if name == "torch":
        return Kernels(append, decode, prefill)
    if name != "triton":
        raise ValueError(f"impl={name!r}: choose one of {NAMES}, or None to choose by device")
    if find_spec("triton") is None:
        raise ImportError("impl='triton' needs Triton: pip install triton, or pass impl='torch'")
    from . import triton_decode, triton_pages, triton_prefill

    return Kernels(triton_pages.append, triton_decode.decode, triton_prefill.prefill)
