"""Operations on a store whose disk fails at random: what it serves is right, and nothing is left behind."""

import gc
import os
import random
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_model
from oracle import random_plan

from redknot_hf import SegmentStore, assemble
from redknot_hf.reuse import store as store_module
from redknot_hf.reuse.assembly import ROOM
from redknot_hf.reuse.recording import record
from redknot_hf.reuse.segment import Segment, empty

OPERATIONS = 10_000
TEXTS = [tuple(random.Random(i).choices(range(1, VOCABULARY), k=1 + 7 * (i % 9))) for i in range(40)]


class Disk:
    """Fails as asked: the next writes find no room, the next reads an error."""

    def __init__(self, monkeypatch) -> None:
        self.failing = Counter()
        monkeypatch.setattr(os, "fsync", lambda descriptor: self._fail("write"))
        monkeypatch.setattr("redknot_hf.reuse.encoding._read_into", self._read)

    def _fail(self, kind: str) -> None:
        if self.failing[kind]:
            self.failing[kind] -= 1
            raise OSError(28 if kind == "write" else 5, "injected")

    def _read(self, file, data):
        self._fail("read")
        return file.readinto(memoryview(data.view(torch.uint8).numpy()))


def content(segment: Segment) -> torch.Tensor:
    """What a segment of this address holds, whoever computes it."""
    generator = torch.Generator().manual_seed(int(segment.address[:12], 16))
    return torch.randn(segment.data.shape, generator=generator)


class Session:
    """One store after another over the same folder, and one operation after another on them."""

    def __init__(self, model, plan, folder: Path, disk: Disk, monkeypatch) -> None:
        self.model, self.plan, self.folder, self.disk = model, plan, folder, disk
        self.random = random.Random(0)
        layers = record(model, plan, [[1]], addresses=["x"])[0].layers

        def computed(model, plan, texts, prefix=(), *, addresses, **options):
            made = [
                empty(a, tuple(t), tuple(prefix), layers, torch.zeros(0))
                for a, t in zip(addresses, texts, strict=True)
            ]
            return [one.with_data(content(one)) for one in made]

        monkeypatch.setattr(store_module, "record", computed)
        # What every store of the model would find out again.
        verdict = store_module.gate(model, plan, page_size=64)
        monkeypatch.setattr(store_module, "gate", lambda *_, **__: verdict)
        self.open()
        self.done = Counter()

    def open(self) -> None:
        most = self.random.choice([0, 4_000, 30_000, None]), self.random.choice([0, 10_000, 100_000, None])
        self.store = SegmentStore(
            self.model, self.plan, device_bytes=most[0], host_bytes=most[1], path=self.folder, identity="model"
        )
        self.most = {"device": most[0], "host": most[1]}

    def text(self):
        return self.store.ref(self.random.choice(TEXTS), self.random.choice([None, (7, 7)]))

    def check(self, segment: Segment, ref) -> None:
        assert (segment.address, segment.ids, segment.prefix) == (ref.address, ref.ids, ref.prefix)
        assert torch.equal(segment.data, content(segment))

    def step(self) -> None:
        kinds = {
            "add": 20, "get": 40, "fetch": 15, "drop": 3, "alter": 5, "cut": 2, "swap": 2, "lose": 3, "fail_write": 4,
            "fail_read": 4, "reopen": 1, "assemble": 1,
        }  # fmt: skip
        (kind,) = self.random.choices(list(kinds), list(kinds.values()))
        self.done[kind] += 1
        getattr(self, kind)()

    def add(self) -> None:
        refs = [self.text() for _ in range(self.random.choice([1, 1, 3]))]
        assert self.store.add_all([ref.ids for ref in refs], refs[0].prefix)[0] == refs[0]

    def get(self) -> None:
        ref = self.text()
        self.check(self.store.get(ref), ref)

    def fetch(self) -> None:
        refs = [self.text() for _ in range(3)]
        for ref, held in zip(refs, self.store.fetch(refs), strict=True):
            self.check(held.here(), ref)

    def drop(self) -> None:
        ref = self.text()
        self.store.drop(ref)
        assert ref not in self.store

    def alter(self) -> None:
        path = self.file()
        if path:
            whole = bytearray(path.read_bytes())
            whole[self.random.randrange(len(whole))] ^= 1 << self.random.randrange(8)
            path.write_bytes(whole)

    def cut(self) -> None:
        path = self.file()
        if path:
            path.write_bytes(path.read_bytes()[: self.random.randrange(path.stat().st_size)])

    def swap(self) -> None:
        """A good file, of another text."""
        a, b = self.file(), self.file()
        if a and b:
            a.write_bytes(b.read_bytes())

    def lose(self) -> None:
        path = self.file()
        if path:
            path.unlink()

    def fail_write(self) -> None:
        self.disk.failing["write"] += self.random.randrange(1, 4)

    def fail_read(self) -> None:
        self.disk.failing["read"] += self.random.randrange(1, 4)

    def reopen(self) -> None:
        self.open()

    def assemble(self) -> None:
        refs = [self.text() for _ in range(self.random.randrange(1, 5))]
        cache = assemble(self.model, refs, boundary=0, page_size=16)
        length, ref = sum(map(len, refs)), refs[-1]
        assert cache.get_seq_length() == length
        (layer,) = cache.layers
        rows, pool = layer.storage.rows, layer.storage.pool
        assert (pool.refs() <= 1).all()
        assert pool.refs().sum() == rows.pages_needed(np.array([length + length // ROOM + ROOM])).sum()
        (kept,) = self.store.get(ref).layers
        heads, tokens = kept.packed(len(ref))
        last = tokens == len(ref) - 1
        _, values = layer.storage.read(0, heads[last], np.full(last.sum(), length - 1))
        assert torch.equal(values, self.store.get(ref).values(0)[torch.from_numpy(last)])

    def file(self) -> Path | None:
        paths = sorted(self.folder.iterdir())
        return self.random.choice(paths) if paths else None

    def check_all(self) -> None:
        for tier in (self.store.tiers.on_device, self.store.tiers.on_host):
            assert tier.nbytes == sum(held.segment.nbytes for held in tier._held.values())
            assert self.most[tier.name] is None or tier.nbytes <= self.most[tier.name]
        assert all(path.suffix == ".safetensors" for path in self.folder.iterdir())


@pytest.fixture
def session(tmp_path, monkeypatch):
    model, others = make_model("llama", num_hidden_layers=1), segments_alive()
    made = Session(model, random_plan(model.config, seed=2), tmp_path, Disk(monkeypatch), monkeypatch)
    made.others = others  # which tests before it still hold
    return made


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def segments_alive() -> int:
    gc.collect()
    return sum(type(one) is Segment for one in gc.get_objects())


def test_a_store_survives_ten_thousand_operations(session):
    files = open_files()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        for i in range(OPERATIONS):
            session.step()
            if i % 250 == 0:
                session.check_all()
    assert min(session.done.values()) > 50
    assert {str(one.message).split(":")[0].split(" ", 2)[2] for one in said} >= {"segment is computed anew"}
    assert all(issubclass(one.category, RuntimeWarning) for one in said)
    assert open_files() <= files
    del session.store
    assert segments_alive() <= session.others


def test_threads_share_a_failing_store(session):
    """Each thread makes its own choices; those that change the files' names stay out."""
    others = []
    for seed in range(4):
        other = object.__new__(Session)
        other.__dict__.update(session.__dict__, random=random.Random(seed), done=Counter())
        others.append(other)

    def work(one: Session) -> int:
        for _ in range(150):
            one.random.choice([one.add, one.get, one.fetch, one.fail_read, one.fail_write, one.get])()
        return 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(work, others)) == 4
    session.check_all()
