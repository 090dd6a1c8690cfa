"""The shelves of a store in their order: a disk of this machine, then what machines share."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from .encoding import Buffer, SegmentFileError, Text
from .files import SegmentFolder
from .redis_shelf import SCHEMES, RedisShelf
from .remote import Remote, UnreachableError
from .segment import Segment
from .shelf import Entry, Shelf

# What names a segment; nothing else may become part of a path.
_ADDRESS = re.compile(r"[0-9a-f]{64}")

AnyUrl = str | os.PathLike[str]


class Shelves:
    """Where segments lie beside memory, the nearest shelf first.

    What is computed goes to all of them; what is read from one is copied to those before it. A value that is damaged,
    or a shelf that fails, is counted and warned of, and the next is asked; in the end the caller computes.

    Args:
        shelves: In order.
        count: Adds to one of the store's counts, by name.
    """

    def __init__(self, shelves: list[Shelf], count: Callable[..., None]) -> None:
        self._shelves = shelves
        self._count = count
        self._known: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._shelves)

    def __iter__(self) -> Iterator[Shelf]:
        return iter(self._shelves)

    def known(self, address: str) -> bool:
        """Whether a segment was on some shelf when last looked; asks nobody."""
        return address in self._known

    def __contains__(self, address: str) -> bool:
        if address not in self._known and any(self._holds(shelf, address) for shelf in self._shelves):
            self._known.add(address)
        return address in self._known

    def write(self, segment: Segment) -> None:
        """Puts a segment that lies in the host's memory on every shelf that takes it."""
        for shelf in self._shelves:
            self._put(shelf, segment, durable=True)

    def read(self, wanted: Segment, buffer: Buffer) -> tuple[Segment, str] | None:
        """Brings a segment to the host's memory, and tells from which tier; `None` if no shelf has a good one.

        Args:
            wanted: What it has to be, without data.
            buffer: Makes the memory to read into.
        """
        refused = ""
        for i, shelf in enumerate(self._shelves):
            try:
                segment = shelf.read(wanted, buffer)
            except FileNotFoundError:
                continue
            except UnreachableError as e:
                self._unreachable(e)
                continue
            except (SegmentFileError, OSError) as e:
                self._count("damaged")
                refused = str(e)
                continue
            for nearer in self._shelves[:i]:
                self._put(nearer, segment, durable=False)
            self._known.add(wanted.address)
            if refused:
                _warn(f"a stored segment is read from {shelf.url}: {refused}")
            return segment, shelf.name
        self._known.discard(wanted.address)
        if refused:
            _warn(f"a stored segment is computed anew: {refused}")
        return None

    def text_of(self, address: str) -> Text | None:
        """Tokens and prefix that lie somewhere under an address, unchecked; `None` if there are none."""
        for shelf in self._shelves if _ADDRESS.fullmatch(address) else ():
            try:
                found = shelf.text_of(address)
            except UnreachableError as e:
                self._unreachable(e)
            except OSError:
                continue
            else:
                if found is not None:
                    return found
        return None

    def drop(self, address: str) -> None:
        """Deletes a segment from every shelf.

        Raises:
            ValueError: It is no address.
            UnreachableError: One of them does not answer, and may still have it.
        """
        if not _ADDRESS.fullmatch(address):
            raise ValueError(f"{address!r:.80} is no address of a segment: give one that store.stored() tells")
        self._known.discard(address)
        for shelf in self._shelves:
            shelf.remove(address)

    def entries(self) -> list[Entry]:
        """What lies on all of them, whoever wrote it."""
        return [entry for shelf in self._shelves for entry in shelf.entries()]

    def __str__(self) -> str:
        return "".join(f", {_held(shelf)} in {shelf.url}" for shelf in self._shelves)

    def _holds(self, shelf: Shelf, address: str) -> bool:
        try:
            return address in shelf
        except UnreachableError as e:
            self._unreachable(e)
            return False

    def _put(self, shelf: Shelf, segment: Segment, durable: bool) -> None:
        try:
            gone = shelf.write(segment, durable=durable)
        except UnreachableError as e:
            self._unreachable(e)
        except OSError as e:
            self._count("failed_writes")
            _warn(f"segment {segment.address[:8]} is kept in memory only: {e}")
        else:
            self._count("evicted", len(gone), shelf.name)
            if segment.address not in gone:
                self._known.add(segment.address)
            if len(self._shelves) == 1:
                self._known.difference_update(gone)

    def _unreachable(self, error: UnreachableError) -> None:
        self._count("unreachable")
        if error.news:
            _warn(f"{error}: until it does, its segments are computed, and new ones are not kept there")


def opened(
    identity: str,
    count: Callable[..., None],
    path: AnyUrl | None,
    remote: str | None,
    disk_bytes: int | None,
    remote_bytes: int | None,
    ttl: float | int | None,
) -> Shelves:
    """The shelves at a folder and at a URL, either of which may be missing.

    Raises:
        ValueError: Both are remote, or a bound is of a shelf that there is not.
        ConnectionError: The remote one does not answer.
    """
    if path is not None and not _is_local(path):
        if remote is not None:
            raise ValueError(
                f"path={path!r} and remote={remote!r} are both remote: give a folder as path, or just one"
            )
        path, remote = None, os.fspath(path)
    if remote is not None and _is_local(remote):
        raise ValueError(f"remote={remote!r} is a folder of this machine: give it as path")
    if disk_bytes is not None and path is None:
        raise ValueError(f"disk_bytes={disk_bytes} bounds a folder: give it as path, or use remote_bytes")
    if remote is None and (remote_bytes is not None or ttl is not None):
        raise ValueError(f"remote_bytes={remote_bytes} and ttl={ttl} are of a remote tier: give its URL as remote")
    shelves: list[Shelf] = [] if path is None else [SegmentFolder(path, identity, disk_bytes)]
    if remote is not None and urlsplit(remote).scheme in SCHEMES:
        shelves.append(Remote(RedisShelf(remote, identity, remote_bytes, ttl)))
    elif remote is not None:
        if ttl is not None:
            raise ValueError(f"ttl={ttl}: only Redis lets segments go by time; give {remote} a lifecycle rule")
        shelves.append(Remote(SegmentFolder(remote, identity, remote_bytes)))
    return Shelves(shelves, count)


def _is_local(url: Any) -> bool:
    text = os.fspath(url)
    return urlsplit(text).scheme not in SCHEMES and isinstance(url_to_fs(text)[0], LocalFileSystem)


def _held(shelf: Shelf) -> str:
    try:
        files, nbytes = shelf.held()
    except OSError as e:
        return f"unknown ({e})"
    return f"{files} file{'s' * (files != 1)} of {nbytes / 2**20:.1f} MiB"


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)
