"""Segments as files: safetensors with a checksum, in a folder of this machine or behind any fsspec URL."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from redknot_hf.cache.span import KeptLayer, Segment, places

_FORMAT = "redknot segment 1"
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
# Headers are some kilobytes; more is no file of ours.
_MOST_HEADER = 100 * 2**20
# Age in seconds at which a file that somebody was writing counts as left behind.
_ABANDONED = 3600.0

Buffer = Callable[[int, torch.dtype], Float[Tensor, " elements"]]


class SegmentFileError(ValueError):
    """A file is no whole segment, or not the one it should be."""


class SegmentFolder:
    """The files of a store, one a segment, named by address.

    A file appears whole or not at all: it is written under another name and then renamed. Any process may read, and
    several may write the same.

    Args:
        url: A folder, or any URL that fsspec knows; made if it is not there.
        identity: Of the model that the segments come from; it stands in the files.
    """

    def __init__(self, url: str | os.PathLike[str], identity: str) -> None:
        self._files: Any
        self._files, self._root = fsspec.core.url_to_fs(os.fspath(url))
        self._local = isinstance(self._files, LocalFileSystem)
        self.url = os.fspath(url)
        self.identity = identity
        self._files.makedirs(self._root, exist_ok=True)
        self._sweep()

    def path(self, address: str) -> str:
        """Where the segment of this address lies, or would."""
        return f"{self._root}/{address}.safetensors"

    def __contains__(self, address: str) -> bool:
        return self._files.exists(self.path(address))

    def nbytes(self, address: str) -> int:
        """Size of a file."""
        return self._files.size(self.path(address))

    def write(self, segment: Segment) -> None:
        """Writes a segment that lies in the host's memory.

        Raises:
            OSError: It cannot be written, to a full disk say; then nothing is left of it.
        """
        content = _content(segment, self.identity)
        unfinished = f"{self._root}/{segment.address}.{uuid.uuid4().hex}.tmp"
        try:
            with self._files.open(unfinished, "wb") as file:
                file.write(content)
                if self._local:
                    file.flush()
                    os.fsync(file.fileno())
            if self._local:
                os.replace(unfinished, self.path(segment.address))  # noqa: PTH105 - both are fsspec's strings
            else:
                self._files.mv(unfinished, self.path(segment.address))
        except BaseException:
            self.remove_path(unfinished)
            raise

    def read(self, address: str, buffer: Buffer = lambda n, dtype: torch.empty(n, dtype=dtype)) -> Segment:
        """Reads a segment into the host's memory and checks it.

        Args:
            address: Which.
            buffer: Makes the memory to read into, from elements and dtype.

        Raises:
            FileNotFoundError: There is no such file.
            SegmentFileError: It is cut short, altered, no segment, or that of another text, plan or model.
        """
        path = self.path(address)
        with self._files.open(path, "rb") as file:
            try:
                said, begin = _read_header(file)
                segment = self._described(said, address, self._files.size(path) - begin, buffer)
                read = _read_into(file, segment.data)
            except (AttributeError, KeyError, TypeError, ValueError) as e:
                raise SegmentFileError(f"{path}: {e}. Delete it; the store computes the segment anew.") from e
        if read != segment.nbytes or _checksum(said, segment.data) != said.get("checksum"):
            raise SegmentFileError(f"{path} was altered: its checksum does not fit. Delete it.")
        return segment

    def remove(self, address: str) -> None:
        """Deletes a segment's file, if there is one."""
        self.remove_path(self.path(address))

    def remove_path(self, path: str) -> None:
        """Deletes a file, if it is there."""
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            return

    def _described(self, said: dict[str, str], address: str, nbytes: int, buffer: Buffer) -> Segment:
        """The segment that a file says it is, its data yet to be read; checked before memory is taken for it."""
        if said["identity"] != self.identity:
            raise ValueError("it comes from another model, or other weights, RoPE parameters or dtype")
        if said["address"] != address:
            raise ValueError("it holds another text, or another plan's part of it")
        layers = tuple(
            None if kept is None else KeptLayer(tuple(kept[0]), tuple(kept[1]), *kept[2:])
            for kept in json.loads(said["layers"])
        )
        ids, prefix = (tuple(json.loads(said[name])) for name in ("ids", "prefix"))
        dtype, elements = _DTYPES[said["dtype"]], places(layers, len(ids))[1]
        if elements * dtype.itemsize != nbytes:
            raise ValueError(f"it has {nbytes} bytes of data and should have {elements * dtype.itemsize}")
        return Segment(address, ids, prefix, layers, buffer(elements, dtype))

    def _sweep(self) -> None:
        """Deletes what processes that were killed while writing have left."""
        for info in self._files.ls(self._root, detail=True):
            changed = info.get("mtime")
            if info["name"].endswith(".tmp") and (changed is None or time.time() - changed > _ABANDONED):
                self.remove_path(info["name"])


def _content(segment: Segment, identity: str) -> bytes:
    said = {
        "format": _FORMAT,
        "address": segment.address,
        "identity": identity,
        "dtype": str(segment.data.dtype),
        "ids": json.dumps(segment.ids),
        "prefix": json.dumps(segment.prefix),
        "layers": json.dumps([None if kept is None else astuple(kept) for kept in segment.layers]),
    }
    said["checksum"] = _checksum(said, segment.data)
    held = [i for i, kept in enumerate(segment.layers) if kept is not None]
    # Names sort in the order of storage, and safetensors writes in the order of names.
    tensors = {f"keys.{i:04}": segment.keys(i) for i in held} | {f"values.{i:04}": segment.values(i) for i in held}
    return save({name: tensor for name, tensor in tensors.items() if tensor.numel()}, metadata=said)


def _read_header(file: Any) -> tuple[dict[str, str], int]:
    """What a safetensors file says of itself, and where its data begins, which goes where we want it."""
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= _MOST_HEADER:
        raise ValueError("it does not begin as a safetensors file does")
    said = json.loads(file.read(size))["__metadata__"]
    if said["format"] != _FORMAT:
        raise ValueError(f"its format is {said['format']!r} and not {_FORMAT!r}")
    return said, 8 + size


def _read_into(file: Any, data: Tensor) -> int:
    """Fills the tensor with what follows; returns the bytes there were."""
    room = _bytes(data)
    done = 0
    while done < len(room) and (read := file.readinto(room[done:])):
        done += read
    return done


def _checksum(said: dict[str, str], data: Tensor) -> str:
    digest = hashlib.sha256()
    for name in ("format", "address", "identity", "dtype", "ids", "prefix", "layers"):
        digest.update(said[name].encode() + b"\0")
    digest.update(_bytes(data))
    return digest.hexdigest()


def _bytes(data: Tensor) -> memoryview:
    """The memory of a tensor of the host."""
    return memoryview(data.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
