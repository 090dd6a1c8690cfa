"""What README's rows on the real model take: bytes, seconds to the first token, and seconds of a later one.

Every row is measured beside dense in one run, and written as soon as it is measured.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache, QuantizedCache

from evals.real.peers import Press, pressing
from evals.result_file import write_line
from evals.timed_model import ROOM, TimedModel
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import HeadProfile

Row = dict[str, Any]
DENSE = "dense"
BUDGETS = (0.28, 0.2, 0.1)  # of plans by fisher
_SHARE = 0.2  # of other plans, and of what a press keeps
_RUNS = 3  # from the prompt on; medians count
# Tokens behind the prompt: none is left where a model's positions end.
_WARM, _NEW, _TURNS, _MORE = 12, 32, 3, 64


@dataclass(frozen=True)
class Speed:
    """What is to be measured.

    Attributes:
        model: SmolLM2 or another, on its device.
        plans: By the names that tables call them.
        peers: Whether other libraries' ways are measured too.
        seconds: After which no further row is begun.
    """

    model: Any
    plans: dict[str, HeadPlan]
    length: int
    batches: Sequence[int]
    peers: bool
    seconds: float
    out: Path


def plans(config: Any, length: int, folder: Path) -> dict[str, HeadPlan]:
    """README's plans: of the profiles that a folder holds, and those that take no profile.

    Raises:
        FileNotFoundError: One of the profiles is not there; the message names the command that makes it.
    """
    found = {}
    for name in ("fisher", "mass"):
        path = folder / f"{name}.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: python -m evals.real profile {name} --out {folder}")
        profile = HeadProfile.load(path)
        for budget in BUDGETS if name == "fisher" else (_SHARE,):
            found[f"{name} {budget}"] = profile.plan(budget=budget, length=length)
    found |= {f"{name} everywhere": HeadPlan.uniform(config, HeadSpec(storage=name)) for name in ("int8", "int4")}
    return found | {f"streaming {_SHARE}": HeadPlan.uniform(config, HeadSpec(max(1, int(_SHARE * length) - 4), 4))}


def measure(speed: Speed) -> list[Row]:
    """Measures every row, writes each at once, and at the end what all of them amount to.

    Of a row: `how` it decodes ("eager": `generate` as it is; "captured": `captured_decoding`; "compiled": `generate`
    with a reserved dense cache), `first_s`, `token_s`, `kv_bytes` and `peak` bytes by the device's allocator (None on
    a CPU), and by how much it is better than dense of the same batch. A row that fails says so in `error`.
    """
    bench = TimedModel(speed.model, speed.plans, speed.length)
    start, rows, dense = time.perf_counter(), [], {}
    for (method, how, batch), found in _rows(bench, speed):
        if time.perf_counter() - start > speed.seconds:
            print(f"out of time before {method}, {how}, batch {batch}")
            break
        row: Row = {"benchmark": "real_speed", "method": method, "how": how, "batch": batch, "length": speed.length}
        try:
            row |= {name: value or None for name, value in found().items()}  # bytes, of a device that tells none
        except (RuntimeError, ImportError, ValueError, TypeError) as error:  # memory, or what a peer does not bear
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        bench.collect()  # outside of the handler, which holds the frames
        if (method, how) == (DENSE, "eager"):
            dense[batch] = row
        rows.append(row | _ratios(row, dense[batch]))
        write_line(speed.out, rows[-1], bench.device)
    table = {method: better(rows, method) for method in dict.fromkeys(row["method"] for row in rows)}
    total = {"benchmark": "real_speed_table", "length": speed.length, "better": table}
    write_line(speed.out, total | {"seconds": round(time.perf_counter() - start, 1)}, bench.device)
    return rows


def better(rows: Sequence[Row], method: str, batch: int = 1) -> tuple[float, float] | None:
    """By which factors a method's first token is sooner than dense, and its tokens a second more, decoded as suits it.

    None where nothing of it was measured.
    """
    mine = [row for row in rows if (row.get("method"), row.get("batch")) == (method, batch) and "times_tokens" in row]
    if not mine:
        return None
    best = max(mine, key=lambda row: row["times_tokens"])
    return best["times_sooner"], best["times_tokens"]


def read(path: Path) -> list[Row]:
    """The rows of a file that `measure` has written."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["benchmark"] == "real_speed"]


def _ratios(row: Row, dense: Row) -> Row:
    if "error" in row or "error" in dense:
        return {}
    found = {"times_sooner": dense["first_s"] / row["first_s"], "times_tokens": dense["token_s"] / row["token_s"]}
    if row["kv_bytes"] and dense["kv_bytes"]:
        found["times_smaller"] = dense["kv_bytes"] / row["kv_bytes"]
    return {name: round(value, 4) for name, value in found.items()}


def _rows(bench: TimedModel, speed: Speed) -> Iterator[tuple[tuple[str, str, int], Callable[[], Row]]]:
    """What is to be measured, what matters most first."""
    for batch in speed.batches:
        ids = bench.ids(batch, speed.length)
        yield (DENSE, "eager", batch), lambda ids=ids: _eager(bench, lambda: bench.cache("dynamic"), ids)
        for name in speed.plans:
            yield (name, "captured", batch), lambda name=name, ids=ids: _captured(bench, name, ids)
        for name in speed.plans:
            made: Callable[[], Any] = lambda name=name: bench.cache(name)  # noqa: E731
            yield (name, "eager", batch), lambda made=made, ids=ids: _eager(bench, made, ids)
        if speed.peers:
            yield ("transformers quanto 4 bits", "eager", batch), lambda ids=ids: _quanto(bench, ids)
            yield ("kvpress AdaKV SnapKV", "eager", batch), lambda ids=ids: _pressed(bench, ids)
        yield (DENSE, "compiled", batch), lambda ids=ids: _static(bench, ids)


def _eager(
    bench: TimedModel,
    make: Callable[[], Any],
    ids: Tensor,
    within: Callable[[Any], AbstractContextManager[None]] = lambda cache: nullcontext(),
) -> Row:
    """A growing cache: the first run warms up, and compiles kernels for this length."""
    runs, held = [], 0
    for turn in range(_RUNS + 1):
        bench.collect()
        before, cache = bench.held(), make()
        with within(cache):
            runs.append(bench.run(cache, ids, _NEW if turn else 4))
        held = bench.held() - before
        del cache
    return _median(runs[1:]) | {"kv_bytes": held or None}


def _captured(bench: TimedModel, name: str, ids: Tensor) -> Row:
    """A reserved cache of ours, one graph a token."""
    bench.collect()
    before = bench.held()
    cache = bench.cache(f"{name}, captured")
    try:
        reserved = bench.reserve(cache, ids) - before
        bench.captured(cache, ids, _WARM)
        first, more = [], ids
        for _ in range(_RUNS):
            cache.reset()
            bench.reset_peak()
            seconds, more = bench.captured(cache, ids, 1)
            first.append(seconds)
        token_s = bench.captured_token(cache, more, _TURNS, _MORE)
        return {
            "first_s": statistics.median(first), "token_s": token_s, "peak": bench.peak(),
            "kv_bytes": reserved, "reserved": bench.longest + ROOM,
        }  # fmt: skip
    finally:
        bench.forget(cache)


def _static(bench: TimedModel, ids: Tensor) -> Row:
    """Transformers' reserved dense cache, whose decoding `generate` compiles where it can."""
    bench.collect()
    before, slots = bench.held(), ids.shape[1] + 2 * _NEW
    cache = bench.cache("static", slots)
    try:
        reserved = bench.reserve(cache, ids) - before
        runs = []
        for turn in range(_RUNS + 1):
            cache.reset()
            runs.append(bench.run(cache, ids, _NEW if turn else _WARM))
        return _median(runs[1:]) | {"kv_bytes": reserved, "reserved": slots}
    finally:
        bench.forget(cache)


def _quanto(bench: TimedModel, ids: Tensor) -> Row:
    bench.model.set_attn_implementation("sdpa")
    return _eager(bench, lambda: QuantizedCache("quanto", bench.model.config, nbits=4, q_group_size=64), ids)


def _pressed(bench: TimedModel, ids: Tensor) -> Row:
    bench.model.set_attn_implementation("sdpa")
    press = Press("SnapKV", _SHARE)
    config = bench.model.config
    return _eager(bench, lambda: DynamicCache(config=config), ids, lambda cache: pressing(bench.model, press, cache))


def _median(runs: Sequence[dict[str, float]]) -> Row:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}
