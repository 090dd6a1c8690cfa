"""What a step of decoding takes of the host, beside the replay of its graph.

`host_ms` is the call of `step` where the device has nothing to do, so that it waits for nothing; `beyond_ms` is what
such a step takes until the device is done, less the replay; and `pipelined_ms` the same of steps that follow each
other as they are served, in which the host works while the device does. All are means, so that they hold what comes
once a page.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from redknot_hf.serving import Engine

from .scene import PLAN, Scene, bar, check, until_all_decode
from .work import Work


def host(scene: Scene, work: Work) -> Iterator[dict[str, Any]]:
    """A row of all seats."""
    engine = scene.engine(work)
    asked = scene.placed(engine, scene.beginning(work.length - 1), [work.new] * work.requests)
    until_all_decode(engine, asked)
    for _ in range(4):
        engine.step()
    gc.collect()
    gc.freeze()  # as `redknot serve` does
    count = (work.new - 12) // 2
    calls, whole = apart(scene, engine, count)
    together = pipelined(scene, engine, count)
    check(asked)
    replay = replayed(scene, engine)
    engine.shutdown()
    gc.unfreeze()
    means = {"host_ms": statistics.mean(calls), "step_ms": statistics.mean(whole), "pipelined_step_ms": together}
    found = {name: 1e3 * seconds for name, seconds in means.items()}
    row = {
        "method": f"engine, {PLAN}", "seats": work.requests, "length": work.length, "steps": count, **found,
        "host_median_ms": 1e3 * statistics.median(calls), "host_most_ms": 1e3 * max(calls),
    }  # fmt: skip
    if replay is not None:
        row |= {"replay_ms": 1e3 * replay, "beyond_ms": found["step_ms"] - 1e3 * replay}
        row["pipelined_beyond_ms"] = found["pipelined_step_ms"] - 1e3 * replay
    yield row | {"bars": {"ms of the host a step": bar(found["host_ms"], most=1)}}


def apart(scene: Scene, engine: Engine, count: int) -> tuple[list[float], list[float]]:
    """Seconds of the calls, and until the device has done what they launched."""
    calls, whole = [], []
    for _ in range(count):
        scene.wait()
        start = time.perf_counter()
        engine.step()
        calls.append(time.perf_counter() - start)
        scene.wait()
        whole.append(time.perf_counter() - start)
    return calls, whole


def pipelined(scene: Scene, engine: Engine, count: int) -> float:
    """Seconds of a step among others."""
    scene.wait()
    start = time.perf_counter()
    for _ in range(count):
        engine.step()
    scene.wait()
    return (time.perf_counter() - start) / count


def replayed(scene: Scene, engine: Engine, times: int = 30) -> float | None:
    """Seconds of the graph alone, by the device's clock; `None` where nothing is captured."""
    if not engine.reader.seats.graphs:
        return None
    graph = engine.reader.seats.graphs[max(engine.reader.seats.graphs)]
    marks = [scene.mark()]
    for _ in range(times):
        graph.replay()
        marks.append(scene.mark())
    scene.wait()
    return statistics.median(scene.between(a, b) for a, b in pairwise(marks))
