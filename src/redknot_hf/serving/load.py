"""What an engine has to do and holds at a moment: for metrics, a page to look at, and routers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from redknot_hf.cache.cache import RedKnotCache, row_layers
from redknot_hf.cache.cold import NAMES
from redknot_hf.cache.pool import PagePool
from redknot_hf.cache.rows import Rows
from redknot_hf.cache.storage import Storage
from redknot_hf.reuse.counts import Counts

from .memory import SeatMemory

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Counted:
    """Of a store, since its start; `redknot_hf.reuse.counts.Counts` says what each is."""

    hits: dict[str, int]
    computed: int
    recomputed: int
    damaged: int
    failed_writes: int
    unreachable: int

    @classmethod
    def of(cls, counts: Counts) -> Counted:
        """A store's."""
        plain = {x.name: getattr(counts, x.name) for x in fields(cls) if x.name != "hits"}
        return cls(dict(counts.hits), **plain)


@dataclass(frozen=True)
class Load:
    """Of an engine.

    Attributes:
        waiting, running, seats: Requests that hold no pages, those that do, and how many may.
        held: Bytes of pages in use, by class of heads (`"global"`, `"local"`) and storage (`"model"`, `"int8"`...).
        busy: Bytes of pages that running requests hold; the rest of those in use are prefixes, which go when a request
            needs the room.
        total, host: Bytes of all pages; and of sequences that were swapped out.
        read, written: Tokens of prompts and of answers, since the start.
        asked, hits: Tokens of prompts, and those of them that parked prefixes held, since the start.
        reused: Tokens of prompts that were taken from stored segments, since the start.
        preemptions: By how, since the start.
        requests: Those that hold pages, as numbers: no text of anybody's.
        store: What the store of segments has done; `None` where there is none.
    """

    waiting: int
    running: int
    seats: int
    held: dict[tuple[str, str], int]
    busy: int
    total: int
    host: int
    read: int
    written: int
    asked: int
    hits: int
    reused: int
    preemptions: dict[str, int]
    requests: list[dict[str, Any]]
    store: Counted | None = None

    @property
    def used(self) -> int:
        """Bytes of pages in use."""
        return sum(self.held.values())

    @property
    def parked(self) -> int:
        """Bytes of pages that only prefixes hold, kept for later requests."""
        return max(self.used - self.busy, 0)

    @classmethod
    def of(cls, engine: Engine) -> Load:
        """An engine's, from any thread; it serves on meanwhile."""
        memory, reader = engine.memory, engine.reader
        running = list(engine.scheduler.running)
        # Whoever leaves meanwhile holds nothing, or a span on the host.
        caches = [held for held in (x.held for x in running) if isinstance(held, RedKnotCache)]
        used, prefixes = memory.used(), memory.prefixes
        return cls(
            waiting=engine.waiting,
            running=engine.running,
            seats=engine.max_batch,
            held=_held(memory),
            busy=sum(_held(memory, caches).values()),
            total=used["total"],
            host=used["host"],
            read=reader.read,
            written=reader.decoded,
            asked=prefixes.asked_tokens,
            hits=prefixes.hit_tokens,
            reused=reader.reused,
            preemptions=dict(engine.scheduler.preemptions),
            requests=[_told(x.request) for x in running],
            store=None if engine.documents is None else Counted.of(engine.documents.store.counts),
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


def _held(memory: SeatMemory, caches: Sequence[RedKnotCache] | None = None) -> dict[tuple[str, str], int]:
    """Bytes of pages that are listed, by whoever holds some or by these caches; what several share counts once."""
    found: dict[tuple[str, str], int] = {}
    layers = memory.layers
    # Layers of equal rules hold the same pages of every sequence.
    alike = {x.rows.rules: [i for i, y in layers.items() if y.rows.rules == x.rows.rules] for x in layers.values()}
    for rules, indices in alike.items():
        root = layers[indices[0]]
        keeps = np.isin(np.arange(rules.heads), list(rules.as_seen.global_heads))
        mine = None if caches is None else [dict(row_layers(cache))[indices[0]].storage for cache in caches]
        for name in _rows_of(root):
            pool = _rows_of(root)[name][1]
            with root.pool.lock:
                listed = pool.listed_by_head(None if mine is None else [_rows_of(x)[name][0] for x in mine])
            each = pool.nbytes // max(pool.size, 1) * len(indices)
            for kind, heads in (("global", keeps), ("local", ~keeps)):
                pages = int(listed[heads].any(0).sum()) if len(listed) else 0
                if pages or name == "model":
                    found[kind, name] = found.get((kind, name), 0) + pages * each
    return found


def _rows_of(storage: Storage) -> dict[str, tuple[Rows, PagePool]]:
    """Rows and pools of a layer, by the storage of their pages."""
    cold = {NAMES[bits]: (part.rows, part.pool) for bits, part in storage.cold.parts.items()}
    return {"model": (storage.rows, storage.pool), **cold}
