"""Replicas as one engine: what the server's routes ask of an engine is asked of whichever replica is the best."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from redknot_hf.plan.plan import HeadPlan
from redknot_hf.reuse.ids import Ids
from redknot_hf.reuse.schedule import Boundary
from redknot_hf.reuse.segment import SegmentRef
from redknot_hf.serving.admission import check_request, scheduled
from redknot_hf.serving.documents import Documents
from redknot_hf.serving.inbox import QueueFullError
from redknot_hf.serving.load import Counted, Load
from redknot_hf.serving.request import Request, Sampling
from redknot_hf.serving.routing import BLOCK, marks

from .board import TOLD
from .catalogue import Catalogue, Text
from .errand import MARK, Errand, Facts, Want
from .flight import GONE, TRIES, Flight
from .options import Options

log = logging.getLogger("redknot_hf.serving")


class Fleet:
    """What `redknot_hf.serving.server.served.Served` asks for, by replicas.

    Attributes:
        waiting: Answers that are under way here.

    Args:
        options: Of the application.
        facts: Of the replicas.
        tokenizer: Of the model.
        plan: The replicas'.
        answerers: Handle of those that answer.
        readers: Handle of those that read; `None` if there are none.
    """

    def __init__(
        self, options: Options, facts: Facts, tokenizer: Any, plan: HeadPlan, answerers: Any, readers: Any = None
    ) -> None:
        self.options, self.tokenizer, self.plan = options, tokenizer, plan
        self.words, self.max_len = facts.words, facts.max_len
        self.error: BaseException | None = None
        self.observe: Callable[[str, float], None] = lambda name, value: None
        self.memory = SimpleNamespace(
            ever_fits=lambda tokens: tokens <= facts.longest,
            needs=lambda tokens: plan.nbytes(tokens, facts.config, facts.dtype),
            used=lambda: {"total": self.load().total},
            sizes=SimpleNamespace(page_size=facts.page_size, columns=facts.columns),
        )
        self.catalogue = Catalogue(facts, plan, self._find)
        self.model = self.catalogue.model
        self.documents: Any = None
        if facts.identity is not None:
            self.documents = Documents(self.catalogue, self.model, plan, options.chunk, tokenizer)
        self.waiting = 0
        self._answerers, self._readers = answerers, readers
        self._name = answerers.deployment_name
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def told(self) -> dict[str, dict[str, Any]]:
        """What replicas told last, by name; nothing of one that has told nothing yet."""
        return TOLD.get(self._name, {})

    @property
    def alive(self) -> bool:
        """Whether there is a replica."""
        return bool(self.told)

    def submit_many(
        self,
        prompt: Sequence[int],
        n: int,
        sampling: Sampling | None = None,
        *,
        segments: Sequence[SegmentRef] = (),
        boundary: Boundary | None = None,
        priority: int = 0,
        timeout: float | int | None = None,
        callback: Callable[[Request, Any], Any] | None = None,
    ) -> list[Request]:
        """As `Engine.submit_many`, on an event loop.

        Raises:
            ValueError: The request can never be served.
            QueueFullError: Too many are under way.
        """
        sampling, ids, engine = sampling or Sampling(), [*map(int, prompt)], _as_engine(self)
        parts = scheduled(segments, boundary, None, engine)
        check_request(ids, sampling, n, engine, parts)
        if self.waiting + n > self.options.queue:
            raise QueueFullError(f"{self.waiting} answers are under way, and at most {self.options.queue} may be")
        lead = [*chain.from_iterable(part.ref.ids for part in parts)]
        made = []
        for i in range(n):
            mine = sampling if sampling.seed is None or not i else replace(sampling, seed=sampling.seed + i)
            made.append(Sent([*lead, *ids], mine, priority, timeout, callback))
        want = Want(self.catalogue.weights(tuple(part.ref for part in parts)), tuple(ids))
        named = tuple((ref.ids, ref.prefix) for ref in segments)
        errand = Errand(tuple(ids), n, sampling, named, boundary, priority, timeout)
        send = self._answerers.options(stream=True).answer.remote
        flight = Flight(send, self._prepared, lambda *told: self.observe(*told), made, want, errand)
        self._begin(flight, made)
        return [*made]

    def add_segment(self, text: Ids, prefix: Ids | SegmentRef | None = None) -> SegmentRef:
        """As `Engine.add_segment`; not on an event loop.

        Raises:
            ValueError: It is no text of the model's.
            RuntimeError: No replica stores it.
        """
        known = isinstance(prefix, SegmentRef)
        behind = (
            (*prefix.prefix, *prefix.ids) if known else (self.documents.opening or None) if prefix is None else prefix
        )
        ref = self.catalogue.ref(text, behind)
        want = Want(self.catalogue.weights((ref,)))
        address = self._asked(lambda: self._answerers.add_segment.remote(want, ref.ids, ref.prefix))
        if address != ref.address:
            raise RuntimeError("the replicas' model is another than it was: end the application, and start it again")
        self.catalogue.know(ref)
        return ref

    def load(self) -> Load:
        """Of all replicas together, as they told last."""
        return total([stats["load"] for stats in self.told.values() if "load" in stats])

    def _begin(self, flight: Flight, made: Sequence[Sent]) -> None:
        task = asyncio.get_running_loop().create_task(flight.run())
        self.waiting += len(made)
        self._tasks.add(task)
        for request in made:
            request.join(task, made)

        def over(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self.waiting -= len(made)

        task.add_done_callback(over)

    async def _prepared(self, errand: Errand) -> Errand:
        """Has a long prompt read by those that only read, unless who answers holds its beginning."""
        if self._readers is None or errand.segments or self._unread(errand.prompt) < self.options.prefill_from:
            return errand
        try:
            await self._readers.read.remote(errand.prompt)
        except (RayError, RayServeException) as e:
            log.warning("a prompt is read by who answers it, since who reads could not: %s", type(e).__name__)
            return errand
        return replace(errand, apart=True)

    def _unread(self, prompt: Sequence[int]) -> int:
        held = [{*stats.get("prefixes", ())} for stats in self.told.values()]
        begun = marks(prompt)
        known = next((n for n in range(len(begun), 0, -1) if any(begun[n - 1] in one for one in held)), 0)
        return len(prompt) - known * BLOCK

    def _find(self, address: str) -> Text | None:
        """Asks one replica after the other for a text."""
        asked: set[str] = set()
        for _ in range(max(len(self.told), 1)):
            want = Want({address[:MARK]: 1}, avoid=frozenset(asked))
            name, found = self._asked(lambda want=want: self._answerers.named.remote(want, address))
            if found is not None:
                return found
            asked.add(name)
        return None

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What a replica says, or another if one goes meanwhile."""
        for left in range(TRIES - 1, -1, -1):
            try:
                return ask().result()
            except GONE as e:
                if not left:
                    raise RuntimeError("no replica answers") from e
        raise AssertionError


class Sent(Request):
    """A request that replicas answer."""

    def join(self, task: asyncio.Task[None], others: Sequence[Request]) -> None:
        """Says what is under way for it, and for whom besides."""
        self._task, self._others, self._loop = task, others, asyncio.get_running_loop()

    def cancel(self) -> None:
        """Gives it up; what is under way ends when nobody wants it any more."""
        super().cancel()
        if all(request.cancelling or request.state.ended for request in self._others) and not self._task.done():
            self._loop.call_soon_threadsafe(self._task.cancel)


def total(loads: Sequence[dict[str, Any]]) -> Load:
    """The sum of what replicas tell."""
    stores = [load["store"] for load in loads]
    store = None if not stores or None in stores else Counted(**_summed([x.name for x in fields(Counted)], stores))
    names = [x.name for x in fields(Load) if x.name != "store"]
    return Load(**_summed(names, loads), store=store)


def _summed(names: Sequence[str], told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers, numbers by name, and lists, each added up."""
    found: dict[str, Any] = {}
    for name in names:
        values = [one[name] for one in told]
        if any(isinstance(value, dict) for value in values) or name in ("held", "preemptions"):
            counter: Counter[Any] = Counter()
            for value in values:
                counter.update(value)
            found[name] = dict(counter)
        elif name == "requests":
            found[name] = [*chain.from_iterable(values)]
        else:
            found[name] = sum(values)
    return found


def _as_engine(fleet: Fleet) -> Any:
    """Checks ask an engine of what a fleet has as well."""
    return fleet
