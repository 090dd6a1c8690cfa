"""Requests that arrive faster than they are served, so that the device is full: times of steps against a roofline.

How many sequences fit is asked of admission: engines with the plan and with all heads global, over equal memory, are
handed more requests than either takes. Then each seat is taken, by sequences whose ends are spread evenly, and
whenever one ends another arrives, whose prompt is read beside those that decode. Two always wait.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from redknot_hf.serving import Engine, Request, Sampling
from redknot_hf.serving.request import Token

from .roofline import Roofline
from .scene import PLAN, Scene, bar, check, until_all_decode
from .work import Work

DENSE = "all global"
Step = tuple[float, float, bool]  # seconds, those of the roofline, and whether something is read


def arrivals(scene: Scene, work: Work) -> Iterator[dict[str, Any]]:
    """Rows of how many sequences fit, and of the steps."""
    held = {plan: admitted(scene, work, plan) for plan in (PLAN, DENSE)}
    more = held[PLAN]["sequences"] / held[DENSE]["sequences"]
    yield {
        "method": "sequences that are admitted", "memory": work.memory, "length": work.length, "new": work.new,
        "held": held, "bars": {"sequences of the plan / of a dense engine": bar(more, least=4)},
    }  # fmt: skip
    yield Arrivals(scene, work).row()


def admitted(scene: Scene, work: Work, plan: str) -> dict[str, int]:
    """Sequences that an engine takes at once if each is to come to its end, and how many its pages say."""
    engine = scene.engine(work, plan, preempt=None)
    prompt = scene.prompts(1, work.length)[0]
    for _ in range(2 * work.requests):
        engine.submit(prompt, Sampling(max_new_tokens=work.new))
    engine.step()
    needs = engine.memory.needs(work.length + work.new - 1)
    found = {"sequences": engine.running, "bytes_each": needs, "by_bytes": engine.memory.sizes.nbytes // needs}
    engine.shutdown()
    return found


class Arrivals:
    """An engine whose every seat is taken, and what its steps and tokens take."""

    def __init__(self, scene: Scene, work: Work) -> None:
        self.scene, self.work = scene, work
        self.roofline = Roofline.of(scene, scene.plans[PLAN])
        self.engine: Engine = scene.engine(work, max_len=work.length + 2 * work.new)
        self.heard: list[float] = []  # between tokens of a request
        self.last: dict[int, float] = {}
        self.asked: list[Request] = []

    def row(self) -> dict[str, Any]:
        """Measures decoding alone, and then with arrivals."""
        work, count = self.work, self.work.requests
        begun = self.scene.beginning(work.length - 1)
        each = max(1, work.new // count)
        alone = work.new // 4
        self.asked = self.scene.placed(self.engine, begun, [4 + alone + each * (i + 1) for i in range(count)])
        until_all_decode(self.engine, self.asked)
        for request in self.asked:
            request.listen(self.hear)
        steps = self.steps(alone, arriving=False)
        only = self.taken()
        arrived = self.steps(work.new, arriving=True)
        found = self.taken()
        self.engine.shutdown()
        reading, decoding = ([x for x in arrived if x[2] is read] for read in (True, False))
        return {
            "method": f"engine, {PLAN}, arrivals", "requests": count, "length": work.length, "new": work.new,
            "memory": work.memory, **self.roofline.row(), "arrived": len(self.asked) - count,
            "alone": {**_summary(steps), "between_tokens_ms": only},
            "full": {**_summary(arrived), "between_tokens_ms": found},
            "steps_that_decode_alone": _summary(decoding), "steps_that_read_too": _summary(reading),
            "tokens_per_s": count * len(arrived) / sum(x[0] for x in arrived),
            "bars": {
                "roofline / time, all steps": bar(_summary(arrived)["of_roofline"], least=0.85),
                "roofline / time, steps that decode alone": bar(_summary(decoding)["of_roofline"], least=0.85),
                "median between tokens / of decoding alone": bar(found["median"] / only["median"], most=1.3),
            },
        }  # fmt: skip

    def steps(self, count: int, arriving: bool) -> list[Step]:
        """Does so many steps, the queue never empty where requests arrive; times are the device's."""
        scene, engine = self.scene, self.engine
        done, marks, bounds = engine.reader, [scene.mark()], []
        for _ in range(count):
            while arriving and engine.waiting < 2:
                prompt = scene.prompts(1, self.work.length)[0]
                self.asked.append(engine.submit(prompt, Sampling(max_new_tokens=self.work.new), callback=self.hear))
            held = {x: x.done for x in engine.scheduler.running}
            decoded, read = done.decoded, done.read
            engine.step()
            marks.append(scene.mark())
            bounds.append(self.bound(held, done.decoded - decoded, done.read - read))
        scene.wait()
        check(self.asked)
        times = [scene.between(a, b) for a, b in pairwise(marks)]
        return [(seconds, least, read) for seconds, (least, read) in zip(times, bounds, strict=True)]

    def bound(self, held: dict[Any, int], decoded: int, read: int) -> tuple[float, bool]:
        """The roofline of the step that has just been launched, and whether it read anything."""
        first = self.work.length
        decoding = sorted((n for n in held.values() if n >= first), reverse=True)[:decoded]
        begun = [x for x in self.engine.scheduler.running if 0 < x.done <= first and held.get(x, 0) < x.done <= first]
        chunks = [(held.get(x, 0), x.done) for x in begun]
        assert sum(last - start for start, last in chunks) == read, (chunks, read)
        return self.roofline.step(decoding, chunks), bool(read)

    def hear(self, request: Request, token: Token | None) -> None:
        """Notes when a request's tokens come."""
        now = time.perf_counter()
        if token is not None and request.number in self.last:
            self.heard.append(now - self.last[request.number])
        self.last[request.number] = now

    def taken(self) -> dict[str, float]:
        """Milliseconds between tokens since it was last asked."""
        found, self.heard = self.heard, []
        cuts = statistics.quantiles(found, n=100)
        return {name: 1e3 * cuts[n - 1] for name, n in (("median", 50), ("p90", 90), ("p99", 99))}


def _summary(steps: list[Step]) -> dict[str, float]:
    if not steps:
        return {"steps": 0, "of_roofline": 0.0}
    seconds, least = (sum(x[i] for x in steps) for i in (0, 1))
    median = statistics.median(x[0] for x in steps)
    share = least / seconds
    return {"steps": len(steps), "s": seconds, "median_ms": 1e3 * median, "roofline_s": least, "of_roofline": share}
