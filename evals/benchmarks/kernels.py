"""What a device spends its time on: kernels by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def kernels_ms(run: Callable[[], object], device: torch.device, times: int = 1) -> dict[str, float]:
    """Profile a call that does something so many times.

    Args:
        run: The call.
        device: Whose kernels count; of a CPU its operators do.
        times: What a figure is divided by.

    Returns:
        Milliseconds in each kernel, the longest twelve first; `""` is all. Kernels may overlap.
    """
    on = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[on], acc_events=True) as profiled:
        run()
    found = {event.key: event.device_time_total / 1e3 / times for event in profiled.key_averages()}
    longest = sorted(found, key=lambda name: -found[name])[:12]
    return {"": sum(found.values()), **{name[:80]: found[name] for name in longest}}
