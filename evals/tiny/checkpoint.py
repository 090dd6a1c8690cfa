"""A training's state on disk: small files, and one that names them, written last."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Some places take files of up to 16 MiB only.
FILE_BYTES = 15 * 2**20
INDEX = "training.json"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, training: dict[str, Any]) -> None:
    """Write the state of a training, so that it is whole on disk at every moment.

    The moments of the optimizer are rounded to bfloat16, on disk and in the optimizer: what goes on is what a restart
    would go on from.

    Args:
        folder: Files of an older state in it are replaced.
        model: Parameters are kept as they are.
        optimizer: AdamW; its moments are rounded in place.
        training: What else a restart needs, as JSON can hold it; `training["step"]` names the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weights.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if (held := optimizer.state[parameter].get(moment)) is not None:
                rounded = held.to(torch.bfloat16)
                held.copy_(rounded)
                tensors[f"{moment}.{name}"] = rounded
    files = []
    for number, part in enumerate(_parts(tensors)):
        files.append(f"{training['step']:07d}-{number}.safetensors")
        write_tensors(folder / files[-1], part)
    write_json(folder / INDEX, {**training, "files": files})
    for path in folder.glob("*.safetensors"):
        if path.name not in files:
            path.unlink()


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load what `save` wrote into the model and a fresh optimizer, and return `training`.

    Raises:
        FileNotFoundError: There is no state, or one of its files is missing.
        ValueError: The state is of another model.
    """
    training = read_index(folder)
    tensors: dict[str, Tensor] = {}
    for name in training.pop("files"):
        tensors |= load_file(folder / name)
    names = {name.removeprefix("weights.") for name in tensors if name.startswith("weights.")}
    expected = {name for name, _ in model.named_parameters()}
    if names != expected:
        raise ValueError(f"{folder} is of another model: {sorted(names ^ expected)[:4]} are in one of them only")
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"weights.{name}"])
        if f"exp_avg.{name}" in tensors:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(float(training["step"]), device=parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = tensors[f"{moment}.{name}"].to(parameter.device, parameter.dtype)
    return training


def read_index(folder: Path) -> dict[str, Any]:
    """Return what is written about the state in a folder.

    Raises:
        FileNotFoundError: There is none.
    """
    return json.loads((folder / INDEX).read_text())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file at once: there is the old one, or the new one."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"})
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def _parts(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split tensors over as few files of `FILE_BYTES` as their order allows."""
    parts: list[dict[str, Tensor]] = [{}]
    room = FILE_BYTES
    for name, tensor in tensors.items():
        if tensor.nbytes > room and parts[-1]:
            parts.append({})
            room = FILE_BYTES
        parts[-1][name] = tensor
        room -= tensor.nbytes
    return parts
