"""Where a model runs and where its weights are, also if hooks bring them from a host or a disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def input_device(model: Any) -> torch.device:
    """Where the model takes its token ids.

    Raises:
        ValueError: Its weights are nowhere, and no hook brings them.
    """
    device = model.device
    if device.type != "meta":
        return device
    for module in (model.get_input_embeddings(), model):
        if (runs := _runs_on(module)) is not None:
            return runs
    raise ValueError("the model's weights are on the meta device, and no hook brings them: load the model")


def devices_of_layers(model: Any, count: int) -> list[torch.device]:
    """Where each layer's attention runs: the device of its weights, or that of the hook that brings them.

    Args:
        model: Its modules are walked once, whatever `count`; none is changed.
        count: Its layers.
    """
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return [model.device] * count
    found: dict[int, torch.device] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if index is None or index in found:
            continue
        for part in module.modules():
            weights = next(part.parameters(recurse=False), None)
            if weights is not None:
                found[index] = weights.device if (runs := _runs_on(part)) is None else runs
                break
    return [found[index] if index in found else input_device(model) for index in range(count)]


@contextmanager
def weight_of(module: nn.Module) -> Iterator[Tensor]:
    """The module's weight, brought by its hook for the duration if it is elsewhere."""
    if module.get_parameter("weight").device.type != "meta":
        yield module.get_parameter("weight")
        return
    from accelerate.utils import align_module_device  # whoever offloads has it

    with align_module_device(module):
        yield module.get_parameter("weight")


def _runs_on(module: nn.Module) -> torch.device | None:
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
