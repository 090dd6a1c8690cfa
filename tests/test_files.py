import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import time
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path

import fsspec
import pytest
import torch
from redknot_kernels import UNBOUNDED
from safetensors import safe_open

from redknot_hf.cache.span import KeptLayer, places
from redknot_hf.reuse.encoding import SegmentFileError, outline
from redknot_hf.reuse.files import SegmentFolder
from redknot_hf.reuse.segment import Segment

LAYERS = (KeptLayer((UNBOUNDED, 2), (0, 1), 3, 4), None, KeptLayer((UNBOUNDED, UNBOUNDED), (0, 0), 3, 4))


def segment(address: str = "abc", dtype: torch.dtype = torch.float32) -> Segment:
    ids = tuple(range(9))
    data = torch.randn(places(LAYERS, len(ids))[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    return Segment(address, ids, (7, 7), LAYERS, data)


def wanted(address: str = "abc", dtype: torch.dtype = torch.float32) -> Segment:
    return outline(address, tuple(range(9)), (7, 7), LAYERS, dtype)


@pytest.fixture
def folder(tmp_path):
    return SegmentFolder(tmp_path, "model")


def same(a: Segment, b: Segment) -> None:
    assert replace(a, data=b.data).__dict__ == b.__dict__
    assert torch.equal(a.data, b.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_file_is_the_segment(tmp_path, scheme, dtype):
    folder = SegmentFolder(f"{scheme}{tmp_path}", "model")
    assert "abc" not in folder
    folder.write(segment(dtype=dtype))
    folder.write(segment(dtype=dtype))  # as another process may at the same time
    same(segment(dtype=dtype), folder.read(wanted(dtype=dtype)))
    assert folder.nbytes("abc") < segment(dtype=dtype).nbytes + 2048
    folder.remove("abc")
    folder.remove("abc")
    assert "abc" not in folder
    with pytest.raises(FileNotFoundError):
        folder.read(wanted())


def test_a_file_is_safetensors(folder):
    folder.write(segment())
    with safe_open(folder.path("abc"), "pt") as file:
        assert file.metadata()["identity"] == "model"
        torch.testing.assert_close(file.get_tensor("values.0002"), segment().values(2))


def test_the_data_is_read_into_the_memory_that_is_given(folder):
    folder.write(segment())
    made = []

    def buffer(elements, dtype):
        made.append(torch.zeros(elements, dtype=dtype))
        return made[-1]

    assert folder.read(wanted(), buffer).data is made[0]


def test_every_damage_is_seen(folder):
    """Every byte of the header, and every bit of some of the data; and every length."""
    folder.write(segment())
    path = Path(folder.path("abc"))
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(0, header, 7), *range(header, len(good), 13), len(good) - 1]:
        bad = bytearray(good)
        bad[at] ^= 1 << at % 7
        path.write_bytes(bad)
        with suppress(SegmentFileError):
            same(folder.read(wanted()), segment())
            assert at < header  # a byte that says nothing: a blank, or a tensor's name
    for size in [0, 3, 8, 100, header, len(good) - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(SegmentFileError, match="Delete it"):
            folder.read(wanted())


def test_files_of_others_are_refused(folder, tmp_path):
    folder.write(segment())
    with pytest.raises(SegmentFileError, match="another model"):
        SegmentFolder(tmp_path, "another").read(wanted())
    shutil.copy(folder.path("abc"), folder.path("def"))
    with pytest.raises(SegmentFileError, match="another text"):
        folder.read(wanted("def"))


def rewritten(path: Path, **entries: str) -> None:
    """Changes what a file says of itself, with a checksum made anew."""
    good = path.read_bytes()
    begin = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:begin])
    said = header["__metadata__"] | entries
    names = ("format", "address", "identity", "dtype", "ids", "prefix", "layers")
    sealed = b"".join(said[name].encode() + b"\0" for name in names) + good[begin:]
    header["__metadata__"] = said | {"checksum": hashlib.sha256(sealed).hexdigest()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + good[begin:])


def test_a_file_is_read_only_as_what_is_asked_for(folder):
    """Whoever forges a header, checksum and all, gets no other tokens, sizes or amounts of memory past the reader."""
    folder.write(segment())
    path = Path(folder.path("abc"))
    rewritten(path)
    same(segment(), folder.read(wanted()))

    def none(elements, dtype):
        raise AssertionError("memory was taken for a forged file")

    good, layers = path.read_bytes(), [None if kept is None else list(astuple(kept)) for kept in LAYERS]
    widest = [[[-2_000_000_000], [2_000_000_000], 3, 4], *layers[1:]]
    for name, forged in (
        ("ids", "[]"), ("prefix", "[7]"), ("dtype", "torch.bfloat16"), ("layers", json.dumps(widest)),
        ("layers", json.dumps([*layers[:2], None])), ("layers", "null"), ("format", "redknot segment 0"),
    ):  # fmt: skip
        path.write_bytes(good)
        rewritten(path, **{name: forged})
        with pytest.raises(SegmentFileError, match=f"its {name} is not what is asked for"):
            folder.read(wanted(), none)


def test_a_header_is_bounded_and_may_be_nested(folder, monkeypatch):
    folder.write(segment())
    path = Path(folder.path("abc"))
    for header in (b"[]," * 2**20, b"[" * 100_000, b"{}", b'{"__metadata__": []}', b'{"__metadata__": {"format": 1}}'):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(SegmentFileError, match="Delete it"):
            folder.read(wanted())
    monkeypatch.setattr("redknot_hf.reuse.encoding._most_header", lambda *said: 2**20)  # of a long text, say
    path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)
    with pytest.raises(SegmentFileError, match="Delete it"):
        folder.read(wanted())


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_what_is_at_rest_is_its_owners_alone(tmp_path):
    before = os.umask(0o022)
    try:
        folder = SegmentFolder(tmp_path / "kv", "model")
        folder.write(segment())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(folder.path("abc")).stat().st_mode) == 0o600


def test_files_of_others_names_are_left_alone(tmp_path):
    other = tmp_path / "notes.tmp"
    other.write_text("mine")
    os.utime(other, (0, 0))
    SegmentFolder(tmp_path, "model")
    assert other.exists()


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write(segment())
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_killed_while_writing_leaves_no_segment(folder, tmp_path):
    child = os.fork()
    if not child:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        folder.write(segment())
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert "abc" not in folder
    with pytest.raises(FileNotFoundError):
        folder.read(wanted())
    SegmentFolder(tmp_path, "model")  # it may still be written
    assert [*tmp_path.iterdir()] == [left]
    long_ago = time.time() - 7200
    os.utime(left, (long_ago, long_ago))
    SegmentFolder(tmp_path, "model")
    assert not any(tmp_path.iterdir())


def test_remote_files_appear_whole(tmp_path):
    folder = SegmentFolder("memory://segments", "model")
    folder.write(segment())
    assert [name.rsplit("/")[-1] for name in fsspec.filesystem("memory").ls("/segments", detail=False)] == [
        "abc.safetensors"
    ]
