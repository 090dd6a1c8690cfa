"""Segments in Redis, for machines that share them: values in parts, a time to live, and a bound on the bytes.

Of a segment there are, under `redknot:segment:ADDRESS`, a hash of what it is (`size`, `part`, `write`), and under
`redknot:segment:ADDRESS:WRITE:N` its bytes in parts. `redknot:used` is a sorted set of addresses by when they were
used last, `redknot:bytes` a hash of their sizes. A value is there from the moment on at which its hash is.
"""

from __future__ import annotations

import errno
import io
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from .encoding import Buffer, SegmentFileError, Text, decoded, encoded, plain_memory, text_said
from .segment import Segment
from .shelf import Entry, Shelf

SCHEMES = ("redis", "rediss", "unix")
_USED, _BYTES = "redknot:used", "redknot:bytes"
# Bytes of a part, and parts that are asked for or sent at once.
_PART, _AT_ONCE = 8 << 20, 4
# Most bytes that Redis takes for a value, and most parts of one.
_LARGEST, _MOST_PARTS = 512 << 20, 1 << 16
# Milliseconds after which parts go that nobody came to publish.
_ABANDONED = 3_600_000
_SAID = ("size", "part", "write")
# Seconds until a server that does not answer counts as gone.
_PATIENCE = 5.0


class RedisShelf(Shelf):
    """The values of a store in a Redis server (or one that speaks its protocol).

    Any server will do that takes `SET`, `HSET` and `ZADD`; it may also evict by itself (`maxmemory-policy
    allkeys-lru`), and what lacks a part then is refused as damaged. What was used when is told by the clocks of those
    who use it.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py has it.
        identity: Of the model that the segments come from; it stands in the values.
        most: Bytes of all segments, whoever wrote them; what was not used for longest makes room. `None` is no bound.
        ttl: Seconds that a segment stays unused before it goes; `None` keeps it.

    Raises:
        ImportError: redis-py is not installed.
        ConnectionError: There is no server at the URL, or it does not let us in.
    """

    name = "remote"

    def __init__(self, url: str, identity: str, most: int | None = None, ttl: float | int | None = None) -> None:
        try:
            import redis
            from redis import exceptions
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as e:
            raise ImportError(f"{without_password(url)} needs redis-py: pip install redknot-hf[redis]") from e
        if ttl is not None and ttl <= 0:
            raise ValueError(f"ttl={ttl}: give seconds, or None to keep segments for good")
        self._errors = exceptions
        self.url, self.identity, self.most = without_password(url), identity, most
        self._ttl = None if ttl is None else max(int(1000 * ttl), 1)
        waits = {"socket_timeout": _PATIENCE, "socket_connect_timeout": _PATIENCE, "retry": Retry(NoBackoff(), 1)}
        self._server: Any = redis.Redis.from_url(url, **waits)
        try:
            self._server.ping()
        except exceptions.RedisError as e:
            reason = str(e).rstrip(".")
            raise ConnectionError(
                f"no Redis at {self.url}: {reason}; start one (redis-server), or correct the URL"
            ) from e

    def __contains__(self, address: str) -> bool:
        return bool(self._server.exists(_key(address)))

    def write(self, segment: Segment, *, durable: bool = True) -> list[str]:
        """Puts a segment here; see `Shelf`. The server says what is durable."""
        content = memoryview(encoded(segment, self.identity))
        if self.most is not None and len(content) > self.most:
            return [segment.address]
        gone = self._make_room(segment.address, len(content), self.most)
        said = {"size": len(content), "part": _PART, "write": uuid.uuid4().hex}
        names = _parts(segment.address, said)
        try:
            for begin in range(0, len(names), _AT_ONCE):
                with self._server.pipeline(transaction=False) as pipe:
                    for i, name in enumerate(names[begin : begin + _AT_ONCE], begin):
                        pipe.set(name, content[i * _PART : (i + 1) * _PART], px=self._ttl or _ABANDONED)
                    pipe.execute()
            self._publish(segment.address, said)
        except BaseException as e:
            with suppress(Exception):  # what went wrong matters more
                self._server.unlink(*names)
            if isinstance(e, self._errors.ResponseError):
                raise OSError(errno.ENOSPC, f"{self.url} refuses a segment: {e}") from e
            raise
        return gone

    def read(self, wanted: Segment, buffer: Buffer = plain_memory) -> Segment:
        """Reads a segment into the host's memory and checks it; see `Shelf`."""
        where = f"{_key(wanted.address)} in {self.url}"
        said = self._said(wanted.address, where)
        if said is None:
            raise FileNotFoundError(where)
        try:
            segment = decoded(self._stream(wanted.address, said), said["size"], wanted, self.identity, where, buffer)
        except self._errors.ResponseError as e:
            raise SegmentFileError(f"{where} is no segment: {e}. Delete it.") from e
        self._touch(wanted.address, said)
        return segment

    def text_of(self, address: str) -> Text | None:
        """Tokens and prefix that the value of an address speaks of; see `Shelf`."""
        with suppress(SegmentFileError, self._errors.ResponseError):
            said = self._said(address, "")
            return None if said is None else text_said(self._stream(address, said))

    def remove(self, address: str) -> None:
        """Deletes a segment, if it is here."""
        self._replace(address, lambda pipe: pipe.zrem(_USED, address).hdel(_BYTES, address))

    def entries(self) -> list[Entry]:
        """What lies here, whoever wrote it, the least recently used first."""
        used = self._server.zrange(_USED, 0, -1, withscores=True)
        with self._server.pipeline(transaction=False) as pipe:
            pipe.hgetall(_BYTES)
            for address, _ in used:
                pipe.exists(_key(address.decode()))
            sizes, *there = pipe.execute()
        expired = [address for (address, _), exists in zip(used, there, strict=True) if not exists]
        if expired:
            with self._server.pipeline() as pipe:
                pipe.zrem(_USED, *expired).hdel(_BYTES, *expired).execute()
        return [
            Entry(address.decode(), self.name, int(sizes.get(address, 0)), when)
            for (address, when), exists in zip(used, there, strict=True)
            if exists
        ]

    def _publish(self, address: str, said: dict[str, Any]) -> None:
        """Lets a segment whose parts are all here be found, in the place of what was there."""

        def put(pipe: Any) -> None:
            pipe.hset(_key(address), mapping=said)
            self._keep_for(pipe, address, said)
            pipe.zadd(_USED, {address: time.time()}).hset(_BYTES, address, said["size"])

        self._replace(address, put)

    def _replace(self, address: str, put: Callable[[Any], Any]) -> None:
        """Deletes what is here of an address and does what `put` adds, at once; again if others came between."""

        def change(pipe: Any) -> None:
            old = pipe.type(_key(address)) == b"hash" and pipe.hmget(_key(address), *_SAID)
            pipe.multi()
            pipe.unlink(_key(address))
            with suppress(ValueError):
                if old and old != [None] * len(_SAID):
                    pipe.unlink(*_parts(address, _checked(old)))
            put(pipe)

        self._server.transaction(change, _key(address))

    def _keep_for(self, pipe: Any, address: str, said: dict[str, Any]) -> None:
        """Gives a segment's keys their time to live."""
        for name in (_key(address), *_parts(address, said)):
            if self._ttl is None:
                pipe.persist(name)
            else:
                pipe.pexpire(name, self._ttl)

    def _touch(self, address: str, said: dict[str, Any]) -> None:
        """Marks a segment as used now, as far as it is still here."""
        with self._server.pipeline(transaction=False) as pipe:
            pipe.zadd(_USED, {address: time.time()}, xx=True)
            if self._ttl is not None:
                self._keep_for(pipe, address, said)
            pipe.execute()

    def _stream(self, address: str, said: dict[str, Any]) -> io.BufferedReader:
        """The bytes of a segment, from the first on."""
        return io.BufferedReader(_Parts(self._server, _parts(address, said)), 4096)

    def _said(self, address: str, where: str) -> dict[str, Any] | None:
        """What is said of a segment here, checked; `None` if it is not here."""
        try:
            found = self._server.hmget(_key(address), *_SAID)
            return None if found == [None] * len(_SAID) else _checked(found)
        except (self._errors.ResponseError, ValueError) as e:
            raise SegmentFileError(f"{where} is no segment: {e}. Delete it.") from e


class _Parts(io.RawIOBase):
    """A value read part by part, some at once; one that is missing ends it."""

    def __init__(self, server: Any, names: list[str]) -> None:
        self._server, self._names = server, names
        self._fetched: list[memoryview] = []

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._fetched and self._names:
            asked, self._names = self._names[:_AT_ONCE], self._names[_AT_ONCE:]
            with self._server.pipeline(transaction=False) as pipe:
                for name in asked:
                    pipe.get(name)
                found = pipe.execute()
            whole = found.index(None) if None in found else len(found)
            if whole < len(found):
                self._names = []
            self._fetched = [memoryview(part) for part in found[:whole] if part]
        if not self._fetched:
            return 0
        part, room = self._fetched[0], memoryview(buffer).cast("B")
        n = min(len(part), len(room))
        room[:n] = part[:n]
        self._fetched[:1] = [part[n:]] if n < len(part) else []
        return n


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    parts = urlsplit(url)
    if parts.password is None and parts.username is None:
        return url
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _key(address: str) -> str:
    return f"redknot:segment:{address}"


def _checked(found: list[bytes | None]) -> dict[str, Any]:
    """What is said of a segment: its bytes, those of a part, and which writing it was.

    Raises:
        ValueError: It makes no sense.
    """
    if any(one is None for one in found):
        raise ValueError("it does not say what it is")
    size, part, write = (one or b"" for one in found)
    said = {"size": int(size), "part": int(part), "write": write.decode()}
    if not (said["size"] > 0 and 0 < said["part"] <= _LARGEST and said["size"] <= _MOST_PARTS * said["part"]):
        raise ValueError(f"it says {said['size']} bytes in parts of {said['part']}")
    return said


def _parts(address: str, said: dict[str, Any]) -> list[str]:
    """The names of the parts."""
    return [f"{_key(address)}:{said['write']}:{i}" for i in range(-(-said["size"] // said["part"]))]
