"""Replicas: one answers, with an engine; one only reads, into the store that the others open."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from redknot_hf.plan.plan import HeadPlan
from redknot_hf.reuse.store import SegmentStore
from redknot_hf.serving.apart import beginning, read_ahead
from redknot_hf.serving.engine import Engine
from redknot_hf.serving.inbox import QueueFullError
from redknot_hf.serving.load import Load
from redknot_hf.serving.request import Request, State, Token
from redknot_hf.serving.routing import marks
from redknot_hf.serving.server.post import Post
from redknot_hf.serving.server.service import longest

from .errand import MARK, Errand, Facts, News, Want
from .options import Options

# Segments and prefixes that a replica tells of, at most; each costs some 20 bytes every time it is looked at.
_TOLD = 1024


def loaded(options: Options) -> tuple[Any, HeadPlan]:
    """The model on its device, and the plan."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=dtype, attn_implementation="redknot", revision=options.revision
    )
    return model.to(device).eval(), HeadPlan.load(options.plan)


class Answerer:
    """Answers errands with an engine of its own, and tells routers what it holds."""

    def __init__(self, options: Options) -> None:
        model, plan = loaded(options)
        store = None if options.store is None else SegmentStore(model, plan, path=options.kept)
        self.engine = Engine(
            model, plan, tokenizer=AutoTokenizer.from_pretrained(options.model, revision=options.revision),
            store=store, memory=options.memory, max_batch=options.max_batch, max_len=options.max_len,
            chunk=options.chunk, preempt=None if options.preempt == "none" else options.preempt,
            parked=options.parked, queue=2 * options.taken,
        ).start()  # fmt: skip
        self.name = serve.get_replica_context().replica_id.unique_id
        self._post: Post | None = None
        self._marks: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()

    async def answer(self, want: Want, errand: Errand) -> AsyncIterator[Any]:
        """The replica's name, then lists of `News` until all answers have ended.

        Args:
            want: What the router went by.
            errand: What is asked.
        """
        yield self.name
        if self._post is None:
            self._post = Post()
        post, queue = self._post, asyncio.Queue[tuple[Request, Token | None]]()
        try:
            requests = await asyncio.to_thread(self._submit, errand, lambda *told: post.put(queue, told))
        except (QueueFullError, RuntimeError) as e:  # of an engine that has ended: another may do better
            yield [News(0, state=State.CANCELLED, reason="shutdown", error=str(e))]
            return
        index, left = {request.number: i for i, request in enumerate(requests)}, len(requests)
        try:
            while left:
                came = [await queue.get()]
                while not queue.empty():
                    came.append(queue.get_nowait())
                news: dict[int, News] = {}
                for request, token in came:
                    one = news.setdefault(request.number, News(index[request.number]))
                    one.cached = request.cached
                    if token is not None:
                        one.tokens.append(token)
                    else:
                        left -= 1
                        self._end(one, request)
                yield list(news.values())
        finally:
            for request in requests:
                request.cancel()

    async def add_segment(self, want: Want, ids: tuple[int, ...], prefix: tuple[int, ...]) -> str:
        """Stores a document; gives its address."""
        store = self._store
        add = lambda: store.add(ids, prefix or None, stand_in=False)  # noqa: E731
        return (await asyncio.to_thread(self.engine.between_steps, add)).address

    async def named(self, want: Want, address: str) -> tuple[str, Any]:
        """The replica's name, and ids and prefix of what lies at an address; `None` if nothing does."""
        try:
            ref = await asyncio.to_thread(self._store.named, address)
        except ValueError:
            return self.name, None
        return self.name, (ref.ids, ref.prefix)

    async def facts(self) -> Facts:
        """What the door has to know."""
        engine, store = self.engine, None if self.engine.documents is None else self._store
        return Facts(
            config=engine.model.config, generation_config=engine.model.generation_config, dtype=engine.model.dtype,
            identity=None if store is None else store.identity,
            refused="" if store is None else store.verdict().reason,
            words=engine.words, max_len=engine.max_len, longest=longest(engine.memory.ever_fits, engine.max_len),
            page_size=engine.memory.sizes.page_size, columns=engine.memory.sizes.columns,
        )  # fmt: skip

    def check_health(self) -> None:
        """Asked by Ray, which replaces who raises.

        Raises:
            RuntimeError: The engine has ended.
        """
        if not self.engine.alive:
            raise RuntimeError("the engine has ended") from self.engine.error

    async def record_routing_stats(self) -> dict[str, Any]:
        """Asked by Ray, which tells routers: plain numbers and names, since others than these processes read them."""
        return await asyncio.to_thread(self._stats)

    @property
    def _store(self) -> SegmentStore:
        documents = self.engine.documents
        assert documents is not None
        return documents.store

    def _submit(self, errand: Errand, callback: Any) -> list[Request]:
        more: dict[str, Any] = {"answered": errand.answered, "callback": callback}
        if errand.segments:
            refs = [self._store.ref(ids, prefix or None, stand_in=False) for ids, prefix in errand.segments]
            more |= {"segments": refs, "boundary": errand.boundary}
        elif errand.apart:
            more["source"] = beginning(self.engine, self._store, errand.prompt)
        return self.engine.submit_many(
            errand.prompt, errand.n, errand.sampling, priority=errand.priority, timeout=errand.timeout, **more
        )

    def _end(self, news: News, request: Request) -> None:
        news.state, news.reason, news.error = request.state, str(request.reason), str(request.error or "")
        if request.state is State.FAILED and not self.engine.alive:
            news.state, news.reason = State.CANCELLED, "shutdown"

    def _stats(self) -> dict[str, Any]:
        engine = self.engine
        load = Load.of(engine)
        stats: dict[str, Any] = {"pid": os.getpid(), "load": asdict(load), "segments": [], "prefixes": []}
        if engine.documents is not None:
            stats["segments"] = [address[:MARK] for address in engine.documents.store.tiers.addresses()[-_TOLD:]]
        found: dict[str, None] = {}
        for prefix in reversed(engine.memory.prefixes.held()):
            if prefix not in self._marks:
                self._marks[prefix] = marks(prefix.ids.tolist())
            found.update(dict.fromkeys(self._marks[prefix]))
            if len(found) > _TOLD:
                break
        stats["prefixes"] = list(found)[:_TOLD]
        return stats


class Reader:
    """Reads prompts into the store that the others open."""

    def __init__(self, options: Options) -> None:
        model, plan = loaded(options)
        self.store = SegmentStore(model, plan, path=options.kept)

    async def read(self, prompt: tuple[int, ...]) -> str:
        """Reads a prompt, unless it was; gives the address at which it lies."""
        (address,) = await asyncio.to_thread(read_ahead, self.store, [prompt])
        return address
