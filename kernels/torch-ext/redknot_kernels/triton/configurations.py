"""Tuned tiles of the Triton kernels: JSON beside the code, the most specific entry wins."""

import json
from functools import lru_cache
from pathlib import Path

import torch


def configuration(kernel, chip, kind, itemsize, dim, group):
    """The tile of a kernel and the options of its launch.

    Args:
        kernel: Name of the file in `configs/`.
        chip: As `chip_name` says it; entries of `"any"` serve all chips.
        kind: What the kernel works on, for entries that name it.
        itemsize: Bytes of an element.
        dim: The larger of key and value dim.
        group: Query heads of a KV head.
    """
    size = f"{8 * itemsize}bit d{max(32, 1 << (dim - 1).bit_length())}"
    for entries in filter(None, map(configurations(kernel).get, (chip, "any"))):
        for name in (f"{kind} {size} g{group}", f"{kind} {size}", size, "default"):
            if name in entries:
                return entries[name]
    raise KeyError(f"no configuration of {kernel} for {kind} {size}")


@lru_cache(maxsize=16)
def configurations(kernel):
    """All tiles of a kernel, by chip."""
    return json.loads(Path(__file__).with_name("configs").joinpath(f"{kernel}.json").read_text())


@lru_cache(maxsize=64)
def chip_name(device):
    """The device's architecture, such as `sm90` or `gfx942`."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm{properties.major}{properties.minor}"


@lru_cache(maxsize=64)
def processors(device):
    """Multiprocessors of the device; 1 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
