"""Segments as files: safetensors with a checksum, in a folder of this machine or behind any fsspec URL.

A file is read only as what it is asked to be: the reader brings an outline of the segment, a header longer than that
one's can be is not read, and none of what a file says decides how much memory is taken for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
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

from redknot_hf.cache.span import KeptLayer

from .segment import Segment, empty

_FORMAT = "redknot segment 1"
_ENDING = ".safetensors"
_ADDRESS = re.compile(r"[0-9a-f]{64}")
# Bytes of a header that is read without knowing what it should say: of some million tokens.
_LONGEST = 1 << 25
# What names a file that is being written.
_UNFINISHED = re.compile(r".+\.[0-9a-f]{32}\.tmp")
# Age in seconds at which a file that somebody was writing counts as left behind.
_ABANDONED = 3600.0

Buffer = Callable[[int, torch.dtype], Float[Tensor, " elements"]]


class SegmentFileError(ValueError):
    """A file is no whole segment, or not the one it should be."""


class SegmentFolder:
    """The files of a store, one a segment, named by address.

    A file appears whole or not at all: it is written under another name and then renamed. Any process may read, and
    several may write the same. On this machine folder and files are made for their owner alone; whoever can write to
    them is trusted with what they say.

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
        if self._local:
            os.makedirs(self._root, mode=0o700, exist_ok=True)  # noqa: PTH103 - it is fsspec's string
        else:
            self._files.makedirs(self._root, exist_ok=True)
        self._sweep()

    def path(self, address: str) -> str:
        """Where the segment of this address lies, or would."""
        return f"{self._root}/{address}{_ENDING}"

    def __contains__(self, address: str) -> bool:
        return self._files.exists(self.path(address))

    def text_of(self, address: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Tokens and prefix that the file of an address speaks of; `None` where there is none that can be read.

        They hash to the address, or the file lies: that is for the caller to see.
        """
        if not _ADDRESS.fullmatch(address):
            return None
        try:
            with self._files.open(self.path(address), "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                said = json.loads(file.read(size))["__metadata__"] if size <= _LONGEST else {}
            return tuple(json.loads(said["ids"])), tuple(json.loads(said["prefix"]))
        except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
            return None

    def nbytes(self, address: str) -> int:
        """Size of a file."""
        return self._files.size(self.path(address))

    def held(self) -> tuple[int, int]:
        """Number and bytes of the segments that lie here, whoever wrote them."""
        self._files.invalidate_cache(self._root)
        sizes = [one["size"] for one in self._files.ls(self._root, detail=True) if one["name"].endswith(_ENDING)]
        return len(sizes), sum(sizes)

    def write(self, segment: Segment) -> None:
        """Writes a segment that lies in the host's memory.

        Raises:
            OSError: It cannot be written, to a full disk say; then nothing is left of it.
        """
        content = _content(segment, self.identity)
        unfinished = f"{self._root}/{segment.address}.{uuid.uuid4().hex}.tmp"
        try:
            with self._created(unfinished) as file:
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

    def read(self, wanted: Segment, buffer: Buffer = lambda n, dtype: torch.empty(n, dtype=dtype)) -> Segment:
        """Reads a segment into the host's memory and checks it.

        Args:
            wanted: What it has to be, without data (`outline`).
            buffer: Makes the memory to read into, from elements and dtype.

        Raises:
            FileNotFoundError: There is no such file.
            SegmentFileError: It is cut short, altered, no segment, or that of another text, plan or model.
        """
        path = self.path(wanted.address)
        with self._files.open(path, "rb") as file:
            said, begin = self._header(file, wanted, path)
            nbytes = self._files.size(path) - begin
            if nbytes != wanted.nbytes:
                raise SegmentFileError(
                    f"{path} has {nbytes} bytes of data and should have {wanted.nbytes}. Delete it."
                )
            segment = wanted.with_data(buffer(wanted.data.numel(), wanted.data.dtype))
            read = _read_into(file, segment.data)
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

    def _header(self, file: Any, wanted: Segment, path: str) -> tuple[dict[str, str], int]:
        """What a file says of itself, which is what is wanted of it, and where its data begins."""
        expected = _said(wanted, self.identity)
        most = _most_header(expected, len(wanted.layers))
        size = int.from_bytes(file.read(8), "little")
        try:
            if not 0 < size <= most:
                raise ValueError(f"it begins with a header of {size} bytes, and this segment's has at most {most}")
            said = json.loads(file.read(size))["__metadata__"]
            for name, of in _FOREIGN.items():
                if said[name] != expected[name]:
                    raise ValueError(f"its {name} is not what is asked for: {of}")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError, MemoryError) as e:
            raise SegmentFileError(f"{path}: {e}. Delete it; the store computes the segment anew.") from e
        return said, 8 + size

    def _created(self, path: str) -> Any:
        """A new file, open for writing; one of this machine is its owner's alone."""
        if not self._local:
            return self._files.open(path, "wb")
        return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))

    def _sweep(self) -> None:
        """Deletes what processes that were killed while writing have left."""
        for info in self._files.ls(self._root, detail=True):
            changed = info.get("mtime")
            if _UNFINISHED.fullmatch(info["name"]) and (changed is None or time.time() - changed > _ABANDONED):
                self.remove_path(info["name"])


# Entries of a header that must be what is asked for, and what they are of if not.
_FOREIGN = {
    "format": "it is of another version, or no segment",
    "identity": "it comes from another model, or other weights, RoPE parameters or dtype",
    "address": "it holds another text, or another plan's part of it",
    "dtype": "the model computes in another",
    "ids": "it holds another text",
    "prefix": "it was read behind another text",
    "layers": "other tokens or sizes are kept of the model's layers",
}


def outline(
    address: str,
    ids: tuple[int, ...],
    prefix: tuple[int, ...],
    layers: tuple[KeptLayer | None, ...],
    dtype: torch.dtype,
) -> Segment:
    """A segment as it is to be, without data."""
    return empty(address, ids, prefix, layers, torch.zeros(0, dtype=dtype, device="meta"))


def _said(segment: Segment, identity: str) -> dict[str, str]:
    """What the file of a segment says of it, but for the checksum."""
    return {
        "format": _FORMAT,
        "address": segment.address,
        "identity": identity,
        "dtype": str(segment.data.dtype),
        "ids": json.dumps(segment.ids),
        "prefix": json.dumps(segment.prefix),
        "layers": json.dumps([None if kept is None else astuple(kept) for kept in segment.layers]),
    }


def _content(segment: Segment, identity: str) -> bytes:
    said = _said(segment, identity)
    said["checksum"] = _checksum(said, segment.data)
    held = [i for i, kept in enumerate(segment.layers) if kept is not None]
    # Names sort in the order of storage, and safetensors writes in the order of names.
    tensors = {f"keys.{i:04}": segment.keys(i) for i in held} | {f"values.{i:04}": segment.values(i) for i in held}
    return save({name: tensor for name, tensor in tensors.items() if tensor.numel()}, metadata=said)


def _most_header(said: dict[str, str], layers: int) -> int:
    """Bytes that the header of such a file has at most: its entries as JSON, and two tensors a layer."""
    return len(json.dumps(said)) + 256 * (2 * layers + 4)


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
