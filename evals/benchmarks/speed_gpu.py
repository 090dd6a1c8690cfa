"""Time and memory of a whole model on one GPU, ours against transformers'."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from evals.benchmarks.kernels import kernels_ms
from evals.benchmarks.measured_model import MeasuredModel
from evals.timed_model import ROOM
from redknot_hf import cache_argument

CHUNK = 8192  # tokens that are read at once where a batch is filled
HELD = 10**11  # bytes of pages
# Tokens behind the prompt that a dense reserved cache has room for: it reads them all.
DENSE_ROOM = 256


class Contest(MeasuredModel):
    """Rows of what the methods take."""

    def row(self, method: str, lengths: list[int], new: int) -> list[dict]:
        """Measures a method at several lengths; a reserved cache of ours serves all, so that it is compiled once."""
        if method == "static" and len(lengths) > 1:
            return [row for length in lengths for row in self.row(method, [length], new)]
        reserved = method == "static" or method.endswith("reserved")
        if method.endswith("captured"):
            return self.captured_row(method, lengths)
        rows, cache, before, kv_bytes = [], None, 0, 0
        for length in lengths:
            ids = self.ids(1, length)
            if not reserved:  # kernels are compiled, and planned for this length
                self.run(self.cache(method), ids, 2)
            if cache is None or not reserved:
                cache = None
                self.collect()
                before = self.held()
                cache = self.cache(method, lengths[0] + DENSE_ROOM if method == "static" else None)
            if reserved and not rows:
                kv_bytes = self.reserve(cache, ids) - before
                self.run(cache, ids[:, :256], 12)  # compiles and captures
            if reserved:
                cache.reset()
            if method == "static":  # it would read 128K tokens under a mask of 16 GiB
                fill(cache, length - 1)
            found = self.run(cache, ids, new)
            if not reserved:
                kv_bytes = self.held() - before
            rows.append({"method": method, "batch": 1, "length": length, **found, "kv_bytes": kv_bytes})
            print(_line(rows[-1]), flush=True)
        self.forget(cache)
        return rows

    def captured_row(self, method: str, lengths: list[int]) -> list[dict]:
        """Measures decoding with one graph a token."""
        self.collect()
        rows, before, cache = [], self.held(), self.cache(method)
        kv_bytes = self.reserve(cache, self.ids(1, 128)) - before
        for length in lengths:
            ids, first, more = self.ids(1, length), 0.0, torch.zeros(1, 0)
            for _ in range(2):  # the first compiles
                cache.reset()
                self.reset_peak()
                first, more = self.captured(cache, ids, 32)
            row = {"method": method, "batch": 1, "length": length, "first_s": first, "peak": self.peak()}
            row |= {"token_s": self.captured_token(cache, more), "kv_bytes": kv_bytes}
            rows.append({**row, "kernels_ms": self.kernels(cache, ids)})
            print(_line(rows[-1]), flush=True)
        self.forget(cache)
        return rows

    def kernels(self, cache: Any, ids: torch.Tensor, tokens: int = 32) -> dict[str, float]:
        """Milliseconds that a captured token behind a prompt spends in each kernel, the longest first; `""` in all."""
        cache.reset()
        _, ids = self.captured(cache, ids, 8)
        return kernels_ms(lambda: self.captured(cache, ids, tokens), self.device, tokens)

    def batch_row(self, method: str, batch: int, length: int) -> list[dict]:
        """Measures decoding of a batch, captured."""
        self.collect()
        ids, before = self.ids(1, length).expand(batch, -1), self.held()
        cache = self.cache(method, length + ROOM)
        try:
            kv_bytes = self.reserve(cache, ids) - before
            cache.extend(self.span(method, ids[:1, :-1]) * batch)
            self.reset_peak()
            _, ids = self.captured(cache, ids, 16)  # compiles
            row = {"method": method, "batch": batch, "length": length}
            row |= {"token_s": self.captured_token(cache, ids), "peak": self.peak(), "kv_bytes": kv_bytes}
        finally:
            self.forget(cache)
        return [with_rate(row)]

    @torch.no_grad()
    def span(self, method: str, ids: torch.Tensor) -> list[Any]:
        """What a cache keeps of one sequence that it has read."""
        cache = self.cache(method.partition(", ")[0])
        for chunk in ids.split(CHUNK, 1):
            self.model(chunk, logits_to_keep=1, **cache_argument(self.model, cache))
        spans = cache.spans(slack=False)
        self.forget(cache)
        return spans

    def held_row(self, method: str, length: int) -> list[dict]:
        """Measures decoding of the most sequences whose reserved pages take `HELD` bytes."""
        one = self.cache(method, length + ROOM)
        self.reserve(one, self.ids(1, 128))
        batch = HELD // one.nbytes
        self.forget(one)
        return [{**row, "held_in": HELD} for row in self.batch_row(method, batch, length)]

    def largest_row(self, method: str, length: int, new: int) -> list[dict]:
        """Measures decoding of the largest dense batch that fits; the cache is filled, no prompt is read."""
        self.collect()
        config = self.model.config
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.model.dtype.itemsize
        room = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else 2 * token * (length + DENSE_ROOM)
        for batch in range(room // (token * (length + DENSE_ROOM)), 0, -1):
            row = self.dense_row(method, batch, length, new)
            if row:
                return [with_rate(row)]
            self.collect()
            print(f"{method:22} {batch:3} x {length:6}: does not fit", flush=True)
        return []

    def dense_row(self, method: str, batch: int, length: int, new: int) -> dict | None:
        """Decoding of a dense batch; `None` if there is no room for it."""
        before, cache = self.held(), self.cache(method, length + DENSE_ROOM)
        try:
            ids = self.ids(batch, length)
            if method == "static":
                self.reserve(cache, ids)
                fill(cache, length - 1)
            else:
                fill_growing(cache, self.model, batch, length - 1)
            kv_bytes = self.held() - before
            row = {"method": method, "batch": batch, "length": length, **self.run(cache, ids, new)}
        except torch.OutOfMemoryError:
            return None
        else:
            return {**row, "kv_bytes": kv_bytes}
        finally:
            self.forget(cache)


def fill(cache: StaticCache, tokens: int) -> None:
    """Puts tokens into a dense cache as if a prompt had been read."""
    layers: Any = cache.layers
    for layer in layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)


def fill_growing(cache: DynamicCache, model: Any, batch: int, tokens: int) -> None:
    """The same for a dense cache that grows."""
    config = model.config
    for layer in range(config.num_hidden_layers):
        shape = batch, config.num_key_value_heads, tokens, config.head_dim
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)


def with_rate(row: dict) -> dict:
    """Adds tokens a second, and prints the row."""
    row = {**row, "tokens_per_s": row["batch"] / row["token_s"]}
    print(f"{_line(row)}, {row['tokens_per_s']:.0f} tokens/s", flush=True)
    return row


def _line(row: dict) -> str:
    first = f"{row['first_s']:7.2f} s" if "first_s" in row else "not read"
    return (
        f"{row['method']:22} {row['batch']:3} x {row['length']:6}: first token {first}, "
        f"{1e3 * row['token_s']:7.2f} ms a token, KV {row['kv_bytes'] / 2**30:6.2f} GiB, "
        f"peak {row['peak'] / 2**30:6.1f} GiB"
    )


def reading_rate(device: torch.device) -> float:
    """Bytes a second that a sum over a large tensor reads."""
    data = torch.ones(2**29 if device.type == "cuda" else 2**20, device=device)
    times: list[float] = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        data.sum().item()
        times.append(time.perf_counter() - start)
    return data.nbytes / statistics.median(times)


def unless_full(bench: Contest, measure: Callable[[], list[dict]]) -> list[dict]:
    """The rows, or none where memory runs out."""
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        print(f"  out of memory: {str(error).splitlines()[0]}")
    bench.collect()  # outside of the handler, which holds the frames
    return []
