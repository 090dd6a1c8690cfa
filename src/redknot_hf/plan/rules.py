"""From a plan's specs to the kernels' rules, for the heads that this process holds."""

from __future__ import annotations

import torch
from redknot_kernels import UNBOUNDED, HeadRules

from .spec import HeadSpec

_BITS = {"model": 0, "int8": 8, "int4": 4}


def head_rules(
    specs: tuple[HeadSpec, ...], page_size: int, sliding_window: int | None, slack: int, hot: int | None = None
) -> HeadRules:
    """The plan's rules, cut to the model's own window: a head that sees further than the model keeps that window.

    `hot` tokens stay as the model made them; with `None` storages do not count, and such heads are plain global ones.
    """
    reach = UNBOUNDED if sliding_window is None else sliding_window
    windows = [min(reach, UNBOUNDED if spec.window is None else spec.window) for spec in specs]
    sinks = [spec.sink if window < reach else 0 for spec, window in zip(specs, windows, strict=True)]
    if hot is None:
        return HeadRules.make(windows, sinks, page_size, reach, slack)
    bits = [_BITS[spec.storage] if window >= UNBOUNDED else 0 for spec, window in zip(specs, windows, strict=True)]
    return HeadRules.make(windows, sinks, page_size, reach, slack, bits, hot if any(bits) else 0)


def local_specs(specs: tuple[HeadSpec, ...], heads: int) -> tuple[HeadSpec, ...]:
    """The specs of this process's heads: under tensor parallelism rank r holds the r-th slice of them."""
    if heads == len(specs):
        return specs
    if len(specs) % heads or not torch.distributed.is_initialized():
        raise ValueError(
            f"the plan has {len(specs)} KV heads for a layer whose keys have {heads}. Make the plan for this model "
            "(HeadPlan.uniform(model.config, ...)); under tensor parallelism the plan has the heads of all ranks."
        )
    rank = torch.distributed.get_rank() % (len(specs) // heads)
    return specs[rank * heads : (rank + 1) * heads]
