"""A sequence that gives way to a more urgent one: its pages to the host and back, and the tokens it goes on with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from redknot_hf.serving import Engine, Request, Sampling

from .scene import PLAN, Scene, bar, check
from .work import Work

TURNS = 5


def swap(scene: Scene, work: Work) -> Iterator[dict[str, Any]]:
    """A row of swaps in the midst of an answer; the first takes the host's pinned memory, the others find it."""
    begun = scene.beginning(work.length - 1)
    engine = scene.engine(work)
    (alone,) = scene.placed(engine, begun, [work.new])
    finish(engine, alone)
    again = engine.submit(alone.prompt, Sampling(max_new_tokens=work.new), source=lambda: begun[1])
    out, back, held = disturbed(scene, engine, again, work.new // (TURNS + 1))
    engine.shutdown()
    whole = [1e3 * (a + b) for a, b in zip(out, back, strict=True)]
    yield {
        "method": f"engine, {PLAN}", "length": work.length, "new": work.new, "bytes": held, "swaps": again.preempted,
        "out_ms": [1e3 * x for x in out], "back_ms": [1e3 * x for x in back], "unchanged": again.ids == alone.ids,
        "bars": {
            "ms out and back, median of the later ones": bar(statistics.median(whole[1:]), most=100),
            "ms out and back, the first time": bar(whole[0], most=100),
        },
    }  # fmt: skip


def disturbed(
    scene: Scene, engine: Engine, request: Request, every: int
) -> tuple[list[float], list[float], int]:  # fmt: skip
    """Lets urgent requests take the one seat again and again; seconds out and back, and bytes on the host."""
    held: list[int] = []
    memory: Any = engine.memory

    def timed(move: Callable[[Any], Any], into: list[float]) -> Callable[[Any], Any]:
        def moved(sequence: Any) -> Any:
            scene.wait()
            start = time.perf_counter()
            found = move(sequence)
            scene.wait()
            into.append(time.perf_counter() - start)
            held.append(memory.host_used)
            return found

        return moved

    out: list[float] = []
    back: list[float] = []
    for turn in range(TURNS):
        while len(request.tokens) < 1 + turn * every:
            engine.step()
        if turn == 0:  # what was placed is there
            memory.swap_out = timed(memory.swap_out, out)
            memory.swap_in = timed(memory.swap_in, back)
        engine.submit(scene.prompts(1, 8)[0], Sampling(max_new_tokens=1), priority=1)
    finish(engine, request)
    return out, back, max(held)


def finish(engine: Engine, request: Request) -> None:
    """Steps to the end of a request."""
    while not request.state.ended:
        engine.step()
    check([request])
