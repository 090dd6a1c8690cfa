"""What an engine has to do and holds at a moment: for metrics, a page to look at, and routers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from redknot_hf.cache.pool import PagePool

    from .engine import Engine


@dataclass(frozen=True)
class Load:
    """Of an engine.

    Attributes:
        waiting, running, seats: Requests that hold no pages, those that do, and how many may.
        held: Bytes of pages in use, by class of heads (`"global"`, `"local"`) and storage (`"model"`, `"int8"`...).
        total, parked, host: Bytes of all pages; of prefixes kept for later, each counted alone; of sequences that were
            swapped out.
        read, written: Tokens of prompts and of answers, since the start.
        asked, hits: Tokens of prompts, and those of them that parked prefixes held, since the start.
        reused: Tokens of prompts that were taken from stored segments, since the start.
        preemptions: By how, since the start.
        requests: Those that hold pages, as numbers: no text of anybody's.
    """

    waiting: int
    running: int
    seats: int
    held: dict[tuple[str, str], int]
    total: int
    parked: int
    host: int
    read: int
    written: int
    asked: int
    hits: int
    reused: int
    preemptions: dict[str, int]
    requests: list[dict[str, Any]]

    @property
    def used(self) -> int:
        """Bytes of pages in use."""
        return sum(self.held.values())

    @classmethod
    def of(cls, engine: Engine) -> Load:
        """An engine's, from any thread; it serves on meanwhile."""
        memory, reader = engine.memory, engine.reader
        used, prefixes = memory.used(), memory.prefixes
        return cls(
            waiting=engine.waiting,
            running=engine.running,
            seats=engine.max_batch,
            held=_held(memory),
            total=used["total"],
            parked=used["parked"],
            host=used["host"],
            read=reader.read,
            written=reader.decoded,
            asked=prefixes.asked_tokens,
            hits=prefixes.hit_tokens,
            reused=reader.reused,
            preemptions=dict(engine.scheduler.preemptions),
            requests=[_told(x.request) for x in list(engine.scheduler.running)],
        )


def _told(request: Any) -> dict[str, Any]:
    return {
        "number": request.number,
        "state": request.state.value,
        "prompt": len(request.prompt),
        "cached": request.cached,
        "answer": len(request.tokens),
        "most": request.sampling.max_new_tokens,
        "seconds": round(time.monotonic() - request.arrived, 1),
    }


def _held(memory: Any) -> dict[tuple[str, str], int]:
    """Bytes of pages that some row lists; a page that several share counts once."""
    found: dict[tuple[str, str], int] = {}
    layers = memory.layers.values()
    # Layers of equal rules hold the same pages of every sequence.
    alike = {storage.rows.rules: [x for x in layers if x.rows.rules == storage.rows.rules] for storage in layers}
    for rules, storages in alike.items():
        first = storages[0]
        keeps = [h in rules.global_heads for h in range(rules.heads)]
        for name, pool in _pools(first):
            with first.pool.lock:
                listed = pool.listed_by_head()
            each = pool.nbytes // max(pool.size, 1)
            for kind, mask in (("global", np.array(keeps)), ("local", ~np.array(keeps))):
                pages = int(listed[mask].any(0).sum())
                key = (kind, name)
                if pages or name == "model":
                    found[key] = found.get(key, 0) + pages * each * len(storages)
    return found


def _pools(storage: Any) -> list[tuple[str, PagePool]]:
    from redknot_hf.cache.cold import NAMES

    return [("model", storage.pool), *((NAMES[bits], part.pool) for bits, part in storage.cold.parts.items())]
