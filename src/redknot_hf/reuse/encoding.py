"""A segment as bytes that outlive the process: safetensors with a checksum, and the check of what is read back.

Bytes are read only as what they are asked to be: the reader brings an outline of the segment, a header longer than
that one's can be is not read, and none of what it says decides how much memory is taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors.torch import save
from torch import Tensor

from redknot_hf.cache.span import KeptLayer

from .coarse import Coarse
from .segment import Segment, empty

_FORMAT, _COARSE_FORMAT = "redknot segment 1", "redknot segment 2"

# Bytes of a header that is read without knowing what it should say: of some million tokens.
_LONGEST = 1 << 25

# Tokens, and those that they were read behind.
Text = tuple[tuple[int, ...], tuple[int, ...]]
# Makes memory of the host to read into, from elements and dtype.
Buffer = Callable[[int, torch.dtype], Shaped[Tensor, " elements"]]


class SegmentFileError(ValueError):
    """What is stored is no whole segment, or not the one it should be."""


def plain_memory(elements: int, dtype: torch.dtype) -> Shaped[Tensor, " elements"]:
    """Memory of the host, as it comes."""
    return torch.empty(elements, dtype=dtype)


def outline(
    address: str,
    ids: tuple[int, ...],
    prefix: tuple[int, ...],
    layers: tuple[KeptLayer | None, ...],
    dtype: torch.dtype,
    coarse: Coarse | None = None,
) -> Segment:
    """A segment as it is to be, without data."""
    return empty(address, ids, prefix, layers, torch.zeros(0, dtype=dtype, device="meta"), coarse)


def encoded(segment: Segment, identity: str) -> bytes:
    """A segment that lies in the host's memory, as bytes: a header that says what it is, then its data.

    Args:
        segment: What is to be stored.
        identity: Of the model that it comes from; it stands in the header.
    """
    said = _said(segment, identity)
    said["checksum"] = _checksum(said, segment.data)
    if segment.coarse is not None:
        return save({"data": segment.data}, metadata=said)
    held = [i for i, kept in enumerate(segment.layers) if kept is not None]
    # Names sort in the order of storage, and safetensors writes in the order of names.
    tensors = {f"keys.{i:04}": segment.keys(i) for i in held} | {f"values.{i:04}": segment.values(i) for i in held}
    return save({name: tensor for name, tensor in tensors.items() if tensor.numel()}, metadata=said)


def decoded(stream: Any, size: int, wanted: Segment, identity: str, where: str, buffer: Buffer) -> Segment:
    """Reads a segment into the host's memory and checks it.

    Args:
        stream: Its bytes, from the first on (`read`, `readinto`).
        size: How many bytes there are.
        wanted: What it has to be, without data (`outline`).
        identity: The model that it has to come from.
        where: Names the place in messages.
        buffer: Makes the memory to read into.

    Raises:
        SegmentFileError: It is cut short, altered, no segment, or that of another text, plan or model.
    """
    said, begin = _header(stream, wanted, identity, where)
    if size - begin != wanted.nbytes:
        raise SegmentFileError(f"{where} has {size - begin} bytes of data and should have {wanted.nbytes}. Delete it.")
    segment = wanted.with_data(buffer(wanted.data.numel(), wanted.data.dtype))
    read = _read_into(stream, segment.data)
    if read != segment.nbytes or _checksum(said, segment.data) != said.get("checksum"):
        raise SegmentFileError(f"{where} was altered: its checksum does not fit. Delete it.")
    return segment


def text_said(stream: Any) -> Text | None:
    """Tokens and prefix that stored bytes speak of; `None` where they do not.

    They hash to the address, or the bytes lie: that is for the caller to see.
    """
    try:
        size = int.from_bytes(stream.read(8), "little")
        said = json.loads(stream.read(size))["__metadata__"] if size <= _LONGEST else {}
        return tuple(json.loads(said["ids"])), tuple(json.loads(said["prefix"]))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None


# Entries of a header that must be what is asked for, and what they are of if not.
_FOREIGN = {
    "format": "it is of another version, or no segment",
    "identity": "it comes from another model, or other weights, RoPE parameters or dtype",
    "address": "it holds another text, or another plan's part of it",
    "dtype": "the model computes in another",
    "storage": "it is held in another number of bits",
    "ids": "it holds another text",
    "prefix": "it was read behind another text",
    "layers": "other tokens or sizes are kept of the model's layers",
}


def _header(stream: Any, wanted: Segment, identity: str, where: str) -> tuple[dict[str, str], int]:
    """What bytes say of themselves, which is what is wanted of them, and where their data begins."""
    expected = _said(wanted, identity)
    most = _most_header(expected, len(wanted.layers))
    size = int.from_bytes(stream.read(8), "little")
    try:
        if not 0 < size <= most:
            raise ValueError(f"it begins with a header of {size} bytes, and this segment's has at most {most}")
        said = json.loads(stream.read(size))["__metadata__"]
        for name, of in _FOREIGN.items():
            if said.get(name) != expected.get(name):
                raise ValueError(f"its {name} is not what is asked for: {of}")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, MemoryError) as e:
        raise SegmentFileError(f"{where}: {e}. Delete it; the store computes the segment anew.") from e
    return said, 8 + size


def _said(segment: Segment, identity: str) -> dict[str, str]:
    """What is said of a segment, but for the checksum."""
    coarse = {} if segment.coarse is None else {"storage": segment.coarse.storage}
    return coarse | {
        "format": _COARSE_FORMAT if coarse else _FORMAT,
        "address": segment.address,
        "identity": identity,
        "dtype": str(segment.dtype),
        "ids": json.dumps(segment.ids),
        "prefix": json.dumps(segment.prefix),
        "layers": json.dumps([None if kept is None else astuple(kept) for kept in segment.layers]),
    }


def _most_header(said: dict[str, str], layers: int) -> int:
    """Bytes that such a header has at most: its entries as JSON, and two tensors a layer."""
    return len(json.dumps(said)) + 256 * (2 * layers + 4)


def _read_into(stream: Any, data: Tensor) -> int:
    """Fills the tensor with what follows; returns the bytes there were."""
    room = _bytes(data)
    done = 0
    while done < len(room) and (read := stream.readinto(room[done:])):
        done += read
    return done


def _checksum(said: dict[str, str], data: Tensor) -> str:
    digest = hashlib.sha256()
    for name in ("format", "address", "identity", "dtype", "ids", "prefix", "layers", "storage"):
        digest.update(said[name].encode() + b"\0" if name in said else b"")
    digest.update(_bytes(data))
    return digest.hexdigest()


def _bytes(data: Tensor) -> memoryview:
    """The memory of a tensor of the host."""
    return memoryview(data.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
