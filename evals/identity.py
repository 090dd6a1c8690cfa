"""What produced a number: the model's weights, the plan, the versions and the machine."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

SAMPLED = 64  # values of each parameter that go into a model's fingerprint
_PACKAGES = ("redknot_hf", "redknot_kernels")


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that stand for a value which JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_identity(model: Any, name: str) -> dict[str, Any]:
    """Return what tells one model from another: its name, its type and a fingerprint of its weights."""
    found = hashlib.sha256()
    for key, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // SAMPLED)
        values = flat[::stride][:SAMPLED].float().cpu().numpy().tobytes()
        found.update(f"{key} {tuple(parameter.shape)} {parameter.dtype}".encode() + values)
    dtype = str(model.dtype).removeprefix("torch.")
    return {"name": name, "type": model.config.model_type, "dtype": dtype, "weights": found.hexdigest()[:16]}


def plan_identity(plan: Any) -> dict[str, Any]:
    """Return a plan's hash and its number of global heads."""
    heads = [[[spec.window, spec.sink] for spec in layer] for layer in plan]
    return {"plan": digest(heads), "global": plan.num_global, "heads": plan.num_heads}


def versions(packages: Iterable[str] = ("torch", "transformers", "redknot-hf")) -> dict[str, str]:
    """Return the versions of Python and of packages; of this project also a hash of its sources."""
    found = {"python": platform.python_version()}
    found |= {name: metadata.version(name) for name in packages}
    if "redknot-hf" in found:
        found["redknot-hf"] += f"+{source_hash()}"
    return found


def source_hash() -> str:
    """Return a hash of the library's sources, wherever they are installed."""
    found = hashlib.sha256()
    for name in _PACKAGES:
        spec = find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            found.update(f"{name}/{path.relative_to(root).as_posix()}".encode() + path.read_bytes())
    return found.hexdigest()[:8]


def hardware(device: torch.device) -> dict[str, str | int]:
    """Return what the times were taken on."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    return {"device": name, "threads": torch.get_num_threads()}
