"""The implementations of the kernels, by name: they share signatures, and a named one runs or raises."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple, Optional

from .plain.attend_at import attend_at
from .plain.cold import append, cool, lay_out, place
from .plain.decode import decode, step
from .plain.prefill import prefill
from .plain.views import step_in_views

NAMES = ("torch", "triton")
_TRITON_DEVICES = ("cuda", "xpu")


class Kernels(NamedTuple):
    """One implementation: functions with the arguments of their plain versions.

    Attributes:
        step_in_views: `step` of one token where rows are plain tensors; `None` where pages cost nothing.
        cool, lay_out: Of stored heads: pages grow cold, and are read back for a long step.
        captured: `step` as an operator for `torch.compile` and CUDA graphs, and without new keys and values `decode`;
            `None` where the host must know lengths.
        in_chunks: A whole text whose pages grow cold while it is read, without a cache; `None` where masks do as well.
    """

    append: Callable
    step: Callable
    decode: Callable
    prefill: Callable
    attend_at: Callable
    place: Callable
    cool: Callable
    lay_out: Callable
    step_in_views: Optional[Callable] = None
    captured: Optional[Callable] = None
    in_chunks: Optional[Callable] = None


def implementation(name, device=None):
    """The kernels of this name; those of `None` are Triton's on an accelerator that runs it, and plain elsewhere.

    Raises:
        ValueError: There is no implementation of this name.
        ImportError: It needs Triton, which is not installed.
    """
    if name is None:
        name = "triton" if device is not None and device.type in _TRITON_DEVICES else "torch"
    if name == "torch":
        return Kernels(append, step, decode, prefill, attend_at, place, cool, lay_out, step_in_views=step_in_views)
    if name != "triton":
        raise ValueError(f"impl={name!r}: choose one of {NAMES}, or None to choose by device")
    if find_spec("triton") is None:
        raise ImportError("impl='triton' needs Triton: pip install triton, or pass impl='torch'")
    from .triton import attend_at as triton_attend_at
    from .triton import decode as triton_decode
    from .triton import in_chunks as triton_in_chunks
    from .triton import prefill as triton_prefill
    from .triton import quantise as triton_quantise
    from .triton import thaw as triton_thaw

    return Kernels(
        triton_quantise.append, triton_decode.step, triton_decode.decode, triton_prefill.prefill,
        triton_attend_at.attend_at, triton_quantise.place, triton_quantise.cool, triton_thaw.lay_out,
        captured=triton_decode.captured, in_chunks=triton_in_chunks.in_chunks,
    )  # fmt: skip
