"""Tiers of a store that outlive the process: disk, then Redis or S3, which two stores share as two machines do."""

import time
import warnings

import fsspec
import pytest
import torch
from families import VOCABULARY, make_model
from oracle import random_plan
from services import redis_server, s3_server

from redknot_hf import SegmentStore
from redknot_hf.reuse.shelf import Shelf
from redknot_hf.reuse.shelves import Shelves, opened


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def plan(model):
    return random_plan(model.config)


@pytest.fixture
def redis(tmp_path):
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def s3(monkeypatch):
    with s3_server(monkeypatch) as url:
        yield url


def store(model, plan, **options) -> SegmentStore:
    return SegmentStore(model, plan, identity="model", **options)


NO_MEMORY = {"device_bytes": 0, "host_bytes": 0}


def damage_redis(server) -> None:
    import redis

    with redis.Redis.from_url(server.url) as client:
        (part,) = client.keys("redknot:segment:*:*:0")
        value = client.get(part)
        client.set(part, value[:-5] + bytes(5))


def damage_s3(url) -> None:
    files = fsspec.filesystem("s3")
    (path,) = files.ls(url, refresh=True)
    content = files.cat_file(path)
    files.pipe_file(path, content[:-5] + bytes(5))


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_two_machines_share_what_one_has_read(model, plan, kind, request, tmp_path):
    """One reads, the other has it; what is damaged is refused and put right; it is listed and deleted by address."""
    server = request.getfixturevalue(kind)
    where, harm = (server.url, damage_redis) if kind == "redis" else (server, damage_s3)
    one, other = (store(model, plan, remote=where, **NO_MEMORY) for _ in range(2))
    refs = one.add_all([text(20), text(30, 1)], [1])
    assert other.add_all([text(20), text(30, 1)], [1]) == refs
    for ref, held in zip(refs, other.fetch([other.ref(ref.ids, ref.prefix) for ref in refs]), strict=True):
        assert torch.equal(held.here().data, one.get(ref).data)
    assert other.counts.computed == other.counts.recomputed == 0
    assert other.counts.hits == {"remote": 2}
    assert {entry.address for entry in other.stored()} == {ref.address for ref in refs}
    assert {entry.tier for entry in other.stored()} == {"remote"}
    assert f"2 files of 0.0 MiB in {where}" in repr(other)
    assert store(model, plan, remote=where).named(refs[1].address) == refs[1]
    with pytest.raises(ValueError, match="no address"):
        other.drop("../../etc")
    other.drop(refs[1].address)
    assert [entry.address for entry in one.stored()] == [refs[0].address]
    good = one.get(refs[0]).data
    harm(server)
    with pytest.warns(RuntimeWarning, match="computed anew: .*checksum"):
        torch.testing.assert_close(other.get(refs[0]).data, good)
    assert (other.counts.damaged, other.counts.recomputed) == (1, 1)
    torch.testing.assert_close(one.get(refs[0]).data, good)
    assert one.counts.damaged == 0
    near = store(model, plan, path=tmp_path / "near", remote=where, **NO_MEMORY)
    for _ in range(2):
        torch.testing.assert_close(near.get(refs[0]).data, good)
    assert near.counts.hits == {"remote": 1, "disk": 1}  # copied to the disk when it came by


def test_a_server_may_go_away_and_come_back(model, plan, redis):
    shared = store(model, plan, remote=redis.url, **NO_MEMORY)
    (remote,) = shared.shelves
    remote.retry = 0.05
    ref = shared.add(text(20))
    good = shared.get(ref).data
    redis.stop()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(shared.get(ref).data, good)
        other = shared.add(text(25))
        torch.testing.assert_close(shared.get(ref).data, good)
        assert "unknown" in repr(shared)
    assert [str(one.message).split("(")[0] for one in said] == [f"{redis.url} does not answer "]
    assert shared.counts.unreachable >= 4
    assert shared.counts.recomputed == 2
    assert shared.counts.damaged == shared.counts.failed_writes == 0
    with pytest.raises(OSError, match="does not answer"):
        shared.drop(other)  # it may still be there
    redis.start()
    time.sleep(0.06)
    torch.testing.assert_close(shared.get(ref).data, good)  # it came back empty, and is filled again
    assert shared.counts.recomputed == 3
    hits = shared.counts.hits["remote"]
    torch.testing.assert_close(shared.get(ref).data, good)
    assert shared.counts.hits["remote"] == hits + 1
    assert shared.counts.recomputed == 3


def test_a_disk_is_bounded_and_what_was_not_used_for_longest_leaves(model, plan, tmp_path):
    one = store(model, plan, path=tmp_path, **NO_MEMORY)
    a = one.add(text(20))
    nbytes = one.stored()[0].nbytes
    bounded = store(model, plan, path=tmp_path, disk_bytes=2 * nbytes + 50, **NO_MEMORY)
    b = bounded.add(text(20, 1))
    bounded.get(a)
    c = bounded.add(text(20, 2))
    assert {path.stem for path in tmp_path.iterdir()} == {a.address, c.address}
    assert [entry.address for entry in bounded.stored()] == [a.address, c.address]
    assert bounded.counts.evicted["disk"] == 1
    assert b not in bounded
    large = bounded.add(text(400))
    assert large not in bounded
    assert bounded.get(large).ids == large.ids
    assert {path.stem for path in tmp_path.iterdir()} == {a.address, c.address}


def test_a_damaged_copy_gives_way_to_the_next_shelf(model, plan, tmp_path):
    both = store(model, plan, path=tmp_path / "near", remote="memory://shelves", **NO_MEMORY)
    ref = both.add(text(20))
    good = both.get(ref).data
    (path,) = (tmp_path / "near").iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.warns(RuntimeWarning, match="is read from memory://shelves"):
        assert torch.equal(both.get(ref).data, good)
    assert torch.equal(both.get(ref).data, good)
    assert both.counts.hits == {"disk": 2, "remote": 1}
    assert (both.counts.damaged, both.counts.recomputed) == (1, 0)
    both.drop(ref)
    assert both.stored() == []


def test_what_a_shelf_answers_does_not_end_the_others(model, plan, tmp_path):
    class Broken(Shelf):
        name, url = "remote", "test://"

        def _no(self, *args, **kwargs):
            raise OSError("no")

        write = read = text_of = remove = entries = _no
        __contains__ = lambda self, address: False  # noqa: E731

    counted = []
    shelves = Shelves([Broken(), *opened("model", lambda *a: None, tmp_path, None, None, None, None)],
                      lambda *of: counted.append(of))  # fmt: skip
    good = store(model, plan).get(store(model, plan).add(text(9)))
    with pytest.warns(RuntimeWarning, match="no"):
        shelves.write(good)
    assert (tmp_path / f"{good.address}.safetensors").exists()
    assert counted[0] == ("failed_writes",)
    assert shelves.text_of(good.address) == (good.ids, good.prefix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "memory://a", "remote": "memory://b"}, "both remote"),
        ({"remote": "kv/"}, "give it as path"),
        ({"disk_bytes": 1}, "bounds a folder"),
        ({"path": "memory://a", "disk_bytes": 1}, "bounds a folder"),
        ({"ttl": 1}, "remote tier"),
        ({"remote": "memory://b", "ttl": 1}, "only Redis"),
    ],
)
def test_tiers_that_make_no_sense_are_refused(model, plan, options, message):
    with pytest.raises(ValueError, match=message):
        store(model, plan, **options)
