"""Segments in a Redis server: had again whole or refused, in parts, for a time, within a bound."""

import time
from dataclasses import replace

import pytest
import torch
from redknot_kernels import UNBOUNDED
from services import free_port, redis_server

from redknot_hf.cache.span import KeptLayer, places
from redknot_hf.reuse import redis_shelf
from redknot_hf.reuse.encoding import SegmentFileError, encoded, outline
from redknot_hf.reuse.redis_shelf import RedisShelf, without_password
from redknot_hf.reuse.segment import Segment

LAYERS = (KeptLayer((UNBOUNDED, 2), (0, 1), 3, 4), None, KeptLayer((UNBOUNDED, UNBOUNDED), (0, 0), 3, 4))
IDS = tuple(range(9))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def shelf(server, monkeypatch):
    monkeypatch.setattr(redis_shelf, "_PART", 150)  # so that a value has many parts
    shelf = RedisShelf(server.url, "model")
    shelf._server.flushall()
    return shelf


def segment(address: str = "abc", dtype: torch.dtype = torch.float32) -> Segment:
    data = torch.randn(places(LAYERS, len(IDS))[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    return Segment(address, IDS, (7, 7), LAYERS, data)


def wanted(address: str = "abc", dtype: torch.dtype = torch.float32) -> Segment:
    return outline(address, IDS, (7, 7), LAYERS, dtype)


def keys(shelf: RedisShelf) -> list[str]:
    return sorted(key.decode() for key in shelf._server.scan_iter())


def part(shelf: RedisShelf, i: int) -> str:
    return next(key for key in keys(shelf) if key.endswith(f":{i}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_is_the_segment(shelf, dtype):
    assert "abc" not in shelf
    with pytest.raises(FileNotFoundError):
        shelf.read(wanted(dtype=dtype))
    for _ in range(2):  # the second takes the place of the first
        assert shelf.write(segment(dtype=dtype)) == []
        assert torch.equal(shelf.read(wanted(dtype=dtype)).data, segment(dtype=dtype).data)
        size = len(encoded(segment(dtype=dtype), "model"))
        assert len(keys(shelf)) == 1 + -(-size // 150) + 2
        assert shelf.held() == (1, size)
    shelf.remove("abc")
    shelf.remove("abc")
    assert "abc" not in shelf
    assert keys(shelf) == []


def test_parts_are_asked_for_several_at_once(shelf, monkeypatch):
    shelf.write(segment())
    parts = len(keys(shelf)) - 3
    asked = []
    pipeline = shelf._server.pipeline

    def counted(*args, **kwargs):
        asked.append(1)
        return pipeline(*args, **kwargs)

    monkeypatch.setattr(shelf._server, "pipeline", counted)
    shelf.read(wanted())
    assert parts > 8
    assert len(asked) == -(-parts // redis_shelf._AT_ONCE) + 1


def test_what_is_damaged_is_refused(shelf):
    def altered():
        value = bytearray(shelf._server.get(part(shelf, 9)))
        value[3] ^= 1
        shelf._server.set(part(shelf, 9), bytes(value))

    def cut():
        shelf._server.set(part(shelf, 9), shelf._server.get(part(shelf, 9))[:-9])

    def a_list():
        name = part(shelf, 0)
        shelf._server.delete(name)
        shelf._server.lpush(name, 1)

    def head(**said):
        shelf._server.hset("redknot:segment:abc", mapping=said)

    def foreign(kind):
        shelf._server.delete("redknot:segment:abc")
        kind("redknot:segment:abc", "x")

    harms = {
        "altered": altered, "cut": cut, "evicted": lambda: shelf._server.delete(part(shelf, 9)),
        "all evicted": lambda: shelf._server.delete(*[key for key in keys(shelf) if key.count(":") == 4]),
        "a list for a part": a_list,
        "larger": lambda: head(size=10**15), "smaller": lambda: head(size=700), "no number": lambda: head(size="x"),
        "no part": lambda: head(part=0), "other writing": lambda: head(write="0" * 32),
        "bytes": lambda: head(write=b"\xff"),
        "half a head": lambda: shelf._server.hdel("redknot:segment:abc", "size"),
        "text": lambda: foreign(shelf._server.set), "list": lambda: foreign(shelf._server.lpush),
    }  # fmt: skip
    for harm in harms.values():
        shelf.write(segment())
        harm()
        with pytest.raises(SegmentFileError, match="Delete it"):
            shelf.read(wanted())
        shelf.write(segment())  # it is put right
        assert torch.equal(shelf.read(wanted()).data, segment().data)
        harm()
        shelf.remove("abc")
        assert "abc" not in shelf


def test_values_of_others_are_refused(shelf, server):
    shelf.write(segment())
    with pytest.raises(SegmentFileError, match="another model"):
        RedisShelf(server.url, "another").read(wanted())
    with pytest.raises(SegmentFileError, match="another text"):
        shelf.read(replace(wanted(), ids=(1,) * 9))


def test_what_is_unused_goes_by_time(shelf, server, monkeypatch):
    kept = RedisShelf(server.url, "model", ttl=100)
    kept.write(segment())
    named = [key for key in keys(shelf) if key.startswith("redknot:segment:abc")]
    for key in named:
        shelf._server.pexpire(key, 5000)
    kept.read(wanted())  # which is a use
    assert all(90_000 < shelf._server.pttl(key) <= 100_000 for key in named)
    short = RedisShelf(server.url, "model", ttl=0.05)
    short.write(segment("def"))
    time.sleep(0.1)
    assert "def" not in short
    assert [entry.address for entry in short.entries()] == ["abc"]
    assert shelf._server.zcard("redknot:used") == shelf._server.hlen("redknot:bytes") == 1
    with pytest.raises(ValueError, match="ttl=0"):
        RedisShelf(server.url, "model", ttl=0)


def test_parts_that_nobody_publishes_go_by_time(shelf, monkeypatch):
    publish, lives = shelf._publish, []

    def watched(address, said):
        lives.extend(shelf._server.pttl(key) for key in keys(shelf))
        publish(address, said)

    monkeypatch.setattr(shelf, "_publish", watched)
    shelf.write(segment())
    assert lives
    assert min(lives) > 0
    assert {shelf._server.pttl(key) for key in keys(shelf)} == {-1}

    def broken(address, said):
        raise KeyboardInterrupt

    monkeypatch.setattr(shelf, "_publish", broken)
    before = keys(shelf)
    with pytest.raises(KeyboardInterrupt):
        shelf.write(segment())
    assert keys(shelf) == before


def test_what_was_not_used_for_longest_makes_room(shelf, server):
    size = len(encoded(segment(), "model"))
    bounded = RedisShelf(server.url, "model", most=2 * size + 9)
    for address in "ab":
        assert bounded.write(segment(address)) == []
    bounded.read(wanted("a"))
    assert bounded.write(segment("c")) == ["b"]
    assert bounded.write(segment("c")) == []
    assert [entry.address for entry in bounded.entries()] == ["a", "c"]
    assert bounded.held() == (2, 2 * size)
    assert RedisShelf(server.url, "model", most=size - 1).write(segment("d")) == ["d"]
    assert "d" not in bounded


def test_a_server_that_is_full_says_so(shelf):
    shelf._server.config_set("maxmemory", 1)
    try:
        with pytest.raises(OSError, match="refuses a segment") as caught:
            shelf.write(segment())
        assert not isinstance(caught.value, ConnectionError)
    finally:
        shelf._server.config_set("maxmemory", 0)


def test_no_server_is_an_error_at_once():
    pytest.importorskip("redis")
    with pytest.raises(ConnectionError, match=r"no Redis at redis://127.0.0.1.*; start one"):
        RedisShelf(f"redis://:secret@127.0.0.1:{free_port()}/0", "model")


def test_passwords_are_not_shown():
    assert without_password("redis://me:secret@host:6379/1?x=2") == "redis://host:6379/1?x=2"
    assert without_password("redis://host/1") == "redis://host/1"
