"""Requests that all decode, against a captured static batch of the same tokens.

One prompt is read, and what was read of it put into pages of each request's own: 32 prompts of 32K tokens would take
half a minute to read. The keys are the same in all, and lie in memory as often as there are requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from redknot_hf.cache.span import Span

from .scene import INT8, PLAN, Scene, bar, check, until_all_decode
from .work import Work

Begun = tuple[list[int], Span]
_AHEAD = 4  # steps before the timed ones: graphs are captured


def decoding(scene: Scene, work: Work) -> Iterator[dict[str, Any]]:
    """Rows of the engine with heads in the model's dtype and in int8, and of the static batch."""
    begun, rates = scene.beginning(work.length - 1), {}
    for plan, compiled in ((PLAN, False), (PLAN, True), (INT8, False)):
        row = engine_row(scene, work, begun, plan, compiled)
        rates[plan, compiled] = row["tokens_per_s"]
        yield row if plan == PLAN else {**row, "of_model_dtype": row["tokens_per_s"] / rates[PLAN, compiled]}
    static = static_row(scene, work, begun)
    names = {"the engine": False, "the engine, compiled,": True}
    yield {**static, "bars": {
        f"tokens/s of {name} / of the static batch": bar(rates[PLAN, compiled] / static["tokens_per_s"], least=0.95)
        for name, compiled in names.items()
    }}  # fmt: skip


def engine_row(scene: Scene, work: Work, begun: Begun, plan: str, compiled: bool) -> dict[str, Any]:
    """Serves the requests, and times the steps in which all decode, together: the host is a step behind."""
    start = time.perf_counter()
    engine = scene.engine(work, plan, compiled=compiled)
    scene.reset_peak()
    asked = scene.placed(engine, begun, [work.new] * work.requests)
    until_all_decode(engine, asked)
    for _ in range(_AHEAD):
        engine.step()
    scene.wait()
    ready = time.perf_counter() - start
    steps, start = work.new - _AHEAD - 8, time.perf_counter()
    for _ in range(steps):
        engine.step()
    scene.wait()
    seconds, kernels = time.perf_counter() - start, scene.kernels(engine.step)
    check(asked)
    read, pages = engine.reader.read, engine.memory.used()["total"]
    engine.shutdown()
    rate = work.requests * steps / seconds
    return {
        "method": f"engine, {plan}{', compiled' * compiled}", "requests": work.requests, "length": work.length,
        "new": work.new, "steps": steps, "step_ms": 1e3 * seconds / steps, "tokens_per_s": rate,
        "tokens_read_by_requests": read, "pages_bytes": pages, "peak": scene.peak(), "ready_s": ready, **kernels,
    }  # fmt: skip


def static_row(scene: Scene, work: Work, begun: Begun) -> dict[str, Any]:
    """Decodes the same tokens as one batch by `captured_decoding`."""
    scene.collect()
    ids, span = begun
    count = max((work.new - 8) // 3 - 16, 2)  # new tokens of a turn, which has 16 more to capture with
    cache = scene.cache(f"{PLAN}, captured", work.length + 8 + 3 * (16 + count))
    cache.extend([span] * work.requests)
    asked = scene.ids(work.requests, work.length)
    asked[:, :-1] = asked.new_tensor(ids)
    _, more = scene.captured(cache, asked, 8)  # compiles
    token = scene.captured_token(cache, more, turns=3, more=count)
    scene.forget(cache)
    return {
        "method": f"captured_decoding, {PLAN}", "requests": work.requests, "length": work.length,
        "new": work.new, "steps": 3 * count, "step_ms": 1e3 * token, "tokens_per_s": work.requests / token,
    }  # fmt: skip
