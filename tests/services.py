"""What tests start on the loopback and end by its own process: Redis, S3 as moto speaks it, two ranks of a worker."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
from pages import typed


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class RedisServer:
    """A redis-server that keeps nothing on disk; it may be stopped and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        words = [*typed("redis-server", {"6379": self.port}), "--appendonly", "no", "--dir", str(self.folder)]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        self.stop()
        raise RuntimeError("redis-server did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def redis_server(folder: Path):
    """A server; the test is skipped, and says so, where there is none to start."""
    pytest.importorskip("redis", reason="redis-py is missing: pip install redknot-hf[redis]")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is missing: apt-get install redis-server")
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def s3_server(monkeypatch):
    """The URL of a bucket of a server that speaks S3, which s3fs is led to by the environment."""
    pytest.importorskip("s3fs", reason="s3fs is missing: pip install s3fs")
    moto = pytest.importorskip("moto.server", reason="moto is missing: pip install moto[server]")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("redknot")
        yield "s3://redknot/kv"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def run_ranks(worker: Path, folder: Path) -> None:
    """Runs `worker.py FOLDER` as two ranks over gloo: what torchrun does, without a process of its own.

    It would end both as soon as one has failed; here each is waited for. Both come from a process that has imported
    transformers for all of them.
    """
    forks = get_context("forkserver")
    forks.set_forkserver_preload(["redknot_hf.serving", "transformers.models.llama.modeling_llama"])
    said = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    said |= {"MASTER_PORT": str(free_port())}
    files = [folder / f"said.{rank}" for rank in range(2)]
    with ExitStack() as ends:
        started = []
        for rank, file in enumerate(files):
            own = said | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(forks.Process(target=_run_rank, args=(worker, folder, own, file)))
            started[-1].start()
            ends.callback(started[-1].join)
            ends.callback(started[-1].kill)
        for process, file in zip(started, files, strict=True):
            process.join(240)
            assert process.exitcode == 0, file.read_text()


def _run_rank(worker: Path, folder: Path, environment: dict[str, str], said: Path) -> None:
    os.environ |= environment
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = [str(worker), str(folder)]
    runpy.run_path(str(worker), run_name="__main__")
