import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import fsspec
import pytest
import torch
from redknot_kernels import UNBOUNDED
from safetensors import safe_open

from redknot_hf.segment import KeptLayer, Segment, places
from redknot_hf.segment_file import SegmentFileError, SegmentFolder

LAYERS = (KeptLayer((UNBOUNDED, 2), (0, 1), 3, 4), None, KeptLayer((UNBOUNDED, UNBOUNDED), (0, 0), 3, 4))


def segment(address: str = "abc", dtype: torch.dtype = torch.float32) -> Segment:
    ids = tuple(range(9))
    data = torch.randn(places(LAYERS, len(ids))[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    return Segment(address, ids, (7, 7), LAYERS, data)


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
    same(segment(dtype=dtype), folder.read("abc"))
    assert folder.nbytes("abc") < segment(dtype=dtype).nbytes + 2048
    folder.remove("abc")
    folder.remove("abc")
    assert "abc" not in folder
    with pytest.raises(FileNotFoundError):
        folder.read("abc")


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

    assert folder.read("abc", buffer).data is made[0]


def test_every_damage_is_seen(folder):
    """Every byte of the header, and every bit of some of the data; and every length."""
    folder.write(segment())
    with open(folder.path("abc"), "rb") as file:
        good = file.read()
    header = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(0, header, 7), *range(header, len(good), 13), len(good) - 1]:
        bad = bytearray(good)
        bad[at] ^= 1 << at % 7
        with open(folder.path("abc"), "wb") as file:
            file.write(bad)
        try:
            read = folder.read("abc")
        except SegmentFileError as e:
            assert "abc.safetensors" in str(e)
        else:  # a byte of the header that says nothing, a blank or a name
            same(read, segment())
            assert at < header
    for size in [0, 3, 8, 100, header, len(good) - 1]:
        with open(folder.path("abc"), "wb") as file:
            file.write(good[:size])
        with pytest.raises(SegmentFileError, match="Delete it"):
            folder.read("abc")


def test_files_of_others_are_refused(folder, tmp_path):
    folder.write(segment())
    with pytest.raises(SegmentFileError, match="another model"):
        SegmentFolder(tmp_path, "another").read("abc")
    shutil.copy(folder.path("abc"), folder.path("def"))
    with pytest.raises(SegmentFileError, match="another text"):
        folder.read("def")


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write(segment())
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from tests.test_segment_file import SegmentFolder, segment
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
SegmentFolder(sys.argv[1], "model").write(segment())
"""


def test_a_process_killed_while_writing_leaves_no_segment(folder, tmp_path):
    died = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=os.path.dirname(os.path.dirname(__file__)))
    assert died.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert "abc" not in folder
    with pytest.raises(FileNotFoundError):
        folder.read("abc")
    SegmentFolder(tmp_path, "model")  # it may still be written
    assert os.listdir(tmp_path) == [left]
    long_ago = time.time() - 7200
    os.utime(tmp_path / left, (long_ago, long_ago))
    SegmentFolder(tmp_path, "model")
    assert os.listdir(tmp_path) == []


def test_remote_files_appear_whole(tmp_path):
    folder = SegmentFolder("memory://segments", "model")
    folder.write(segment())
    assert [name.rsplit("/")[-1] for name in fsspec.filesystem("memory").ls("/segments", detail=False)] == [
        "abc.safetensors"
    ]
