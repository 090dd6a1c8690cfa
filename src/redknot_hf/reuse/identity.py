"""What a stored segment depends on, as a hash.

It tells models apart that differ by chance or by training. It is no seal: who may choose the weights of a model that
runs here can compute, with some effort, others of the same identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from redknot_hf.plan.plan import HeadPlan

_FORMAT = 2
# Words of 8 bytes that are summed at a time.
_CHUNK = 1 << 20
# Odd numbers whose bits look random (of splitmix64 and xxhash), as signed words.
_PLACE, _FIRST, _SECOND = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# Parts of a config that do not change what a model computes.
_NEUTRAL = ("_name_or_path", "transformers_version", "architectures", "use_cache", "output_attentions")


def model_identity(model: nn.Module) -> str:
    """Hashes the model: config (RoPE and quantisation included), adapters, names, dtypes and values of all weights.

    Values enter as two checksums a tensor, computed on its device: its bits, word by word, are mixed with their place,
    and what that gives and its square are summed; one changed bit changes the first. Parallel ranks differ, as their
    slices do.

    Raises:
        ValueError: Some weights are not in memory (offloaded to a disk), so they cannot be read.
    """
    text = getattr(model, "config", None)
    config = text.to_dict() if text is not None else {}
    config = {name: value for name, value in config.items() if name not in _NEUTRAL}
    digest = hashlib.sha256(json.dumps([_FORMAT, config, _adapters(model)], sort_keys=True, default=str).encode())
    sums = []
    for name, tensor in _tensors(model):
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name} is not in memory (offloaded), so the model cannot be told from another one. Give the store a "
                "name for it: SegmentStore(..., identity='name and revision')"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sums += _checksums(tensor)
    home = sums[0].device if sums else torch.device("cpu")
    for value in torch.stack([s.to(home) for s in sums]).tolist() if sums else []:
        digest.update(value.to_bytes(8, "little", signed=True))
    return digest.hexdigest()


def weights_state(model: nn.Module) -> int:
    """A quick mark of the weights' places and versions: as long as it stays, the model's identity stays.

    Weights made in inference mode have no version: a change in place goes unnoticed there.
    """
    marks = [(t.data_ptr(), -1 if t.is_inference() else t._version) for _, t in _tensors(model)]
    return hash((tuple(marks), str(_adapters(model))))


def segment_address(
    identity: str, plan: HeadPlan, keep: str, ids: Sequence[int], prefix: Sequence[int], storage: str = "model"
) -> str:
    """The name under which a segment is stored.

    Args:
        identity: Of the model and the dtype of its keys.
        plan: What heads keep, and what they saw when the segment was computed.
        keep: `"plan"` or `"full"`.
        ids, prefix: The tokens, and those before them.
        storage: In how many bits it is held.
    """
    heads = [[(spec.window, spec.sink) for spec in layer] for layer in plan]
    parts = [_FORMAT, identity, heads, keep, list(map(int, prefix)), list(map(int, ids))]
    parts += [] if storage == "model" else [storage]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    named: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        local = getattr(tensor, "to_local", None)  # of a tensor that is spread over processes, this one's part
        yield name, tensor if local is None else local()


def _adapters(model: nn.Module) -> list[Any]:
    """Which adapters are on: their weights alone do not say."""
    found = []
    for name, module in model.named_modules():
        active = getattr(module, "active_adapters", None)
        if isinstance(active, (list, tuple)) and hasattr(module, "disable_adapters"):
            found.append((name, list(active), bool(module.disable_adapters), str(getattr(module, "scaling", ""))))
    return found


def _checksums(tensor: Tensor) -> list[Tensor]:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = plain.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), 8 * _CHUNK):
        mixed = _mixed(_words(bits[start : start + 8 * _CHUNK]), start)
        total += torch.stack([mixed.sum(), (mixed * mixed).sum()])
    return [*total]


def _words(bits: Tensor) -> Tensor:
    """Bytes in words of eight, the last filled up with zeros; a copy."""
    words = torch.zeros(-(-len(bits) // 8), dtype=torch.int64, device=bits.device)
    words.view(torch.uint8)[: len(bits)] = bits
    return words


def _mixed(words: Tensor, start: int) -> Tensor:
    """Each word as a random-looking function of itself and its place, one to one in the word; in place."""
    words ^= torch.arange(start + 1, start + 1 + len(words), device=words.device) * _PLACE
    for factor in (_FIRST, _SECOND):
        words *= factor
        words ^= (words >> 32) & 0xFFFFFFFF
    return words
