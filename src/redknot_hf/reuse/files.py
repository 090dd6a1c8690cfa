"""Segments as files, in a folder of this machine or behind any URL that fsspec knows."""

from __future__ import annotations

import os
import re
import time
import uuid
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from .encoding import Buffer, Text, decoded, encoded, plain_memory, text_said
from .segment import Segment
from .shelf import Entry, Shelf

_ENDING = ".safetensors"
# What names a file that is being written.
_UNFINISHED = re.compile(r".+\.[0-9a-f]{32}\.tmp")
# Age in seconds at which a file that somebody was writing counts as left behind.
_ABANDONED = 3600.0
# What file systems call the time at which a file was last written.
_WRITTEN = ("mtime", "LastModified", "updated", "last_modified", "created")


class SegmentFolder(Shelf):
    """The files of a store, one a segment, named by address.

    A file appears whole or not at all: it is written under another name and then renamed. On this machine folder and
    files are made for their owner alone, and reading a file marks it as used (by its time of change); elsewhere what
    was written first leaves first. Whoever can write here is trusted with what they say.

    Args:
        url: A folder, or any URL that fsspec knows; made if it is not there.
        identity: Of the model that the segments come from; it stands in the files.
        most: Bytes of all files, whoever wrote them; what was not used for longest makes room. `None` is no bound.
    """

    def __init__(self, url: str | os.PathLike[str], identity: str, most: int | None = None) -> None:
        self._files: Any
        self._files, self._root = fsspec.core.url_to_fs(os.fspath(url))
        self._local = isinstance(self._files, LocalFileSystem)
        self.name = "disk" if self._local else "remote"
        self.url = os.fspath(url)
        self.identity, self.most = identity, most
        if self._local:
            os.makedirs(self._root, mode=0o700, exist_ok=True)  # noqa: PTH103 - it is fsspec's string
        else:
            self._files.makedirs(self._root, exist_ok=True)
        self._sweep()

    def path(self, address: str) -> str:
        """Where the segment of this address lies, or would."""
        return f"{self._root}/{address}{_ENDING}"

    def __contains__(self, address: str) -> bool:
        self._forget()
        return self._files.exists(self.path(address))

    def text_of(self, address: str) -> Text | None:
        """Tokens and prefix that the file of an address speaks of; see `Shelf`."""
        try:
            with self._files.open(self.path(address), "rb") as file:
                return text_said(file)
        except FileNotFoundError:
            return None

    def nbytes(self, address: str) -> int:
        """Size of a file."""
        return self._files.size(self.path(address))

    def entries(self) -> list[Entry]:
        """What lies here, whoever wrote it, the least recently used first."""
        found = [
            Entry(PurePosixPath(one["name"]).stem, self.name, one["size"], _time(one))
            for one in self._listed()
            if one["name"].endswith(_ENDING)
        ]
        return sorted(found, key=lambda entry: (entry.used, entry.address))

    def write(self, segment: Segment, *, durable: bool = True) -> list[str]:
        """Writes a segment that lies in the host's memory; see `Shelf`."""
        content = encoded(segment, self.identity)
        if self.most is not None and len(content) > self.most:
            return [segment.address]
        gone = self._make_room(segment.address, len(content), self.most)
        unfinished = f"{self._root}/{segment.address}.{uuid.uuid4().hex}.tmp"
        try:
            with self._created(unfinished) as file:
                file.write(content)
                if self._local and durable:
                    file.flush()
                    os.fsync(file.fileno())
            if self._local:
                _touch(unfinished)
                os.replace(unfinished, self.path(segment.address))  # noqa: PTH105 - both are fsspec's strings
            else:
                self._files.mv(unfinished, self.path(segment.address))
        except BaseException:
            with suppress(Exception):  # what went wrong matters more
                self.remove_path(unfinished)
            raise
        return gone

    def read(self, wanted: Segment, buffer: Buffer = plain_memory) -> Segment:
        """Reads a segment into the host's memory and checks it; see `Shelf`."""
        path = self.path(wanted.address)
        self._forget()
        with self._files.open(path, "rb") as file:
            segment = decoded(file, self._files.size(path), wanted, self.identity, path, buffer)
        if self._local:
            with suppress(OSError):  # others may have deleted it meanwhile
                _touch(path)
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
        finally:
            self._forget()

    def _created(self, path: str) -> Any:
        """A new file, open for writing; one of this machine is its owner's alone."""
        if not self._local:
            return self._files.open(path, "wb")
        return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))

    def _listed(self) -> list[dict[str, Any]]:
        self._forget()
        try:
            return self._files.ls(self._root, detail=True)
        except FileNotFoundError:  # a bucket has no empty folders
            return []

    def _forget(self) -> None:
        """Lets the file system look again: others write here too, and some remember what they saw."""
        self._files.invalidate_cache(self._root)

    def _sweep(self) -> None:
        """Deletes what processes that were killed while writing have left."""
        for info in self._listed():
            if _UNFINISHED.fullmatch(info["name"]) and time.time() - _time(info) > _ABANDONED:
                self.remove_path(info["name"])


def _touch(path: str) -> None:
    now = time.time_ns()  # finer than the clock by which file systems stamp
    os.utime(path, ns=(now, now))


def _time(info: dict[str, Any]) -> float:
    """When a file was last written, in seconds since 1970; 0 if its file system does not say."""
    found: Any = next((info[name] for name in _WRITTEN if info.get(name) is not None), 0.0)
    return float(found.timestamp() if hasattr(found, "timestamp") else found)
