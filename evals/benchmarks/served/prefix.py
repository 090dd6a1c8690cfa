"""Requests that begin alike: when their first token comes, and in how many pages the prefix lies."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from redknot_hf.serving import Engine, Request, Sampling

from .scene import PLAN, Scene, bar, check
from .work import Work

QUESTION = 64  # tokens behind the prefix


def prefix(scene: Scene, work: Work) -> Iterator[dict[str, Any]]:
    """A row of requests one after the other, and of all at once."""
    engine = scene.engine(work, parked=0.5)
    warm, shared = scene.prompts(2, work.length - QUESTION)
    one = Sampling(max_new_tokens=2)
    for ids in (warm, [*warm, *scene.prompts(1, QUESTION)[0]]):  # compiles, and plans these lengths
        check(engine.generate([ids], one))
    read = first_token(engine.generate([shared], one))[0]
    questions = scene.prompts(2 * work.requests, QUESTION)
    after = [first_token(engine.generate([[*shared, *more]], one))[0] for more in questions[: work.requests]]
    before = engine.memory.used()["used"]
    asked = [engine.submit([*shared, *more], Sampling(max_new_tokens=work.new)) for more in questions[work.requests :]]
    while not all(request.tokens for request in asked):
        engine.step()
    used = engine.memory.used()["used"] - before
    counted = pages(engine, shared)
    engine.drain()
    check(asked)
    together = first_token(asked)
    engine.shutdown()
    row = {
        "method": f"engine, {PLAN}", "requests": work.requests, "prefix": len(shared), "question": QUESTION,
        "read_s": read, "first_token_s": statistics.median(after), "at_once_first_s": statistics.median(together),
        "at_once_last_s": max(together), "cached": min(x.cached for x in asked), **counted, "bytes_of_requests": used,
        "bytes_if_nothing_were_shared": work.requests * engine.memory.needs(work.length),
    }  # fmt: skip
    yield row | {
        "bars": {
            "first token / of reading the prefix": bar(row["first_token_s"] / read, most=0.15),
            "all at once, median first token / of reading them all": bar(
                row["at_once_first_s"] / (read * work.requests), most=0.15
            ),
            "pages of the prefix in memory / of one sequence": bar(counted["pages"] / counted["pages_of_one"], most=1),
        }
    }


def pages(engine: Engine, shared: list[int]) -> dict[str, int]:
    """Pages of rows that keep everything in which the prefix lies, counted in the tables of all sequences.

    A page that is not full is copied by whoever writes on; full ones are the prefix's.
    """
    full, found, one = len(shared) // engine.memory.page_size, set(), 0
    for i, storage in engine.memory.layers.items():
        heads = list(storage.rows.rules.global_heads)
        one += full * len(heads)
        for sequence in engine.scheduler.running:
            table = sequence.held.layers[i].storage.rows.table[0, heads, :full]
            found |= {(i, page) for page in table.ravel().tolist()}
    return {"pages": len(found), "pages_of_one": one}


def first_token(asked: list[Request]) -> list[float]:
    """Seconds that each waited for it."""
    check(asked)
    return [(request.first_token or 0) - request.arrived for request in asked]
