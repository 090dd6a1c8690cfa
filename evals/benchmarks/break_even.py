"""From which bandwidth on fetching a context's KV takes less time than reading the context again."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from evals.benchmarks.measured_model import MeasuredModel
from redknot_hf import cache_argument
from redknot_hf.cache.span import Span


class Sender:
    """Sends some bytes to whoever connects, no faster than `rate` bytes a second, as long as it is open."""

    def __init__(self, data: memoryview, rate: float) -> None:
        self.data, self.rate = data, rate
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Sender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._door.accept()
            except OSError:  # closed
                return
            with line:
                start, piece = time.perf_counter(), max(min(1 << 20, int(self.rate / 100)), 1)
                for begin in range(0, len(self.data), piece):
                    early = start + begin / self.rate - time.perf_counter()
                    if early > 0:
                        time.sleep(early)
                    line.sendall(self.data[begin : begin + piece])


def fetched(port: int, nbytes: int) -> torch.Tensor:
    """The bytes that a sender has, in the host's memory.

    Raises:
        ConnectionError: It sends fewer.
    """
    data = torch.empty(nbytes, dtype=torch.uint8)
    room, done = memoryview(data.numpy()), 0  # pyright: ignore[reportArgumentType]
    with socket.create_connection(("127.0.0.1", port)) as line:
        while done < nbytes:
            got = line.recv_into(room[done:])
            if not got:
                raise ConnectionError(f"{done} bytes came of {nbytes}")
            done += got
    return data


def compare(bench: MeasuredModel, kind: str, length: int, rates: list[float], runs: int) -> dict[str, Any]:
    """Seconds of reading a context under a plan, and of fetching it at each rate (MB a second)."""
    ids, name = bench.ids(1, length), {"dense": "all global", "planned": "1/8 global"}[kind]

    def read() -> Any:
        cache = bench.cache(name)
        with torch.no_grad():
            bench.model(ids, use_cache=True, logits_to_keep=1, **cache_argument(bench.model, cache))
        return cache

    (span,) = read().spans(slack=False)
    data = memoryview(span.data.cpu().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]

    def fetch(port: int) -> Any:
        cache, came = bench.cache(name), fetched(port, len(data)).view(span.data.dtype)
        cache.extend([Span(span.tokens, span.layers, came.to(bench.device))])
        return cache

    reading = _seconds(bench, read, runs)
    rows = []
    for rate in rates:
        with Sender(data, rate * 1e6) as sender:
            if not torch.equal(fetch(sender.port).spans(slack=False)[0].data, span.data):
                raise RuntimeError("what was fetched is not what was sent")
            rows.append({"mb_per_s": rate, "fetch_s": _seconds(bench, lambda: fetch(sender.port), runs)})
    return {
        "kind": kind, "length": length, "bytes": len(data), "read_s": reading, "fetched": rows,
        "break_even_mb_per_s": len(data) / 1e6 / reading,
    }  # fmt: skip


def _seconds(bench: MeasuredModel, work: Callable[[], Any], runs: int) -> float:
    taken = []
    for _ in range(runs):
        bench.wait()
        start = time.perf_counter()
        work()
        bench.wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
