"""The engine: `Engine(model, plan)` serves many requests at once, over one budget of pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.per_layer import text_config
from redknot_hf.plan.plan import HeadPlan, as_plan
from redknot_hf.reuse.ids import Ids
from redknot_hf.reuse.schedule import Boundary
from redknot_hf.reuse.segment import SegmentRef
from redknot_hf.reuse.store import SegmentStore

from . import scheduler as scheduling
from .admission import check_answered, check_arguments, check_request, ids_of, scheduled, store_of
from .batch import Seats
from .documents import Documents, Named
from .loop import Loop
from .memory import SeatMemory
from .orders import Orders
from .ranks import Ranks
from .reading import Reader
from .request import Request, Sampling, State, Token
from .stops import ends_of


class Engine(Loop):
    """Serves requests that come and go, with the tokens that `generate` gives under the same plan.

    Every step gives a token to each sequence that decodes, and reads chunks of prompts beside them. Requests are
    admitted by exact pages: what a plan's heads need of a length is known beforehand.

    Of a tensor-parallel model every rank makes an engine, of the same arguments: rank 0 takes requests, and the others
    `follow()` until it ends. Memory is that of the rank which has least, or whose heads need most.

    Args:
        model: Any decoder of transformers with `attn_implementation="redknot"`; used, never changed.
        plan: Rule of every KV head, or the file of a plan.
        memory: Pages for all sequences: bytes, `"8GiB"`, or a share of what is free on each device.
        max_batch: Sequences that hold pages at once, at most.
        max_len: Tokens of a prompt and its answer, at most; the model's own limit by default.
        chunk: Tokens of prompts that are read in a step, at most.
        preempt: What happens to the sequences that came last when pages run out: `"swap"` moves them to the host (up
            to `host` bytes) and back, `"recompute"` reads them again, `None` lets none run out: a request begins when
            all that it may need is free.
        parked: Share of the pages that prefixes kept for later requests may hold; 0 keeps none.
        park_every: Chunks of a prompt after which its beginning is parked; its end always is.
        queue: Requests that wait at most.
        tokenizer: For prompts that are text, and for stop strings.
        store: Documents that requests may name as segments; of the same model and plan.
        page_size, impl: Of the cache.
        host: Bytes on the host for sequences that are swapped out; for one, up to 1 GiB, they are pinned at once.
        capture: Whether steps of decoding are CUDA graphs, where they can be.
        compiled: Whether these are compiled before (`torch.compile`): the first step waits most of a minute for it,
            and the later ones, which then are steps of all seats, are shorter.
        rank_timeout: Seconds that ranks wait for each other, before they end with an error.

    Raises:
        ValueError: The plan does not fit the model, the model cannot be served, or an argument is off.
    """

    def __init__(  # noqa: PLR0913 - all but two have defaults
        self,
        model: Any,
        plan: HeadPlan | AnyPath,
        *,
        memory: float | int | str = 0.9,
        max_batch: int = 32,
        max_len: int | None = None,
        chunk: int = 2048,
        preempt: str | None = "swap",
        parked: float | int = 0.5,
        park_every: int = 4,
        queue: int = 4096,
        tokenizer: Any = None,
        store: SegmentStore | None = None,
        page_size: int = 64,
        impl: str | None = None,
        host: int = 8 << 30,
        capture: bool = True,
        compiled: bool = False,
        rank_timeout: float | int = 600,
    ) -> None:
        super().__init__(queue)
        config = text_config(model)
        limit = getattr(config, "max_position_embeddings", None)
        self.max_len = max_len or limit or 0
        check_arguments(config, self.max_len, (max_batch, chunk, park_every, queue), preempt, parked)
        self.model, self.plan, self.tokenizer = model, as_plan(plan, config), tokenizer
        self.words, self.max_batch = config.vocab_size, max_batch
        self.ranks = Ranks(model, rank_timeout)
        with self.ranks.joined():
            self.ranks.check_alone(store=store)
            self.memory = SeatMemory(
                model, self.plan, memory, max_batch, self.max_len,
                page_size=page_size, impl=impl, host=host if preempt == "swap" else 0, parked=parked, ranks=self.ranks,
            )  # fmt: skip
            seats = Seats(self.memory, max_batch, self.max_len, capture, compiled)
            self.documents = None if store is None else Documents(store, model, self.plan, chunk, tokenizer)
        self.scheduler = scheduling.Scheduler(self.memory, max_batch, chunk, preempt, lambda: self.reader.settle())
        self.reader = Reader(self.memory, seats, self._finish, park_every * chunk, self.documents)
        self.observe: Callable[[str, float], None] = lambda name, value: None
        self.reader.observe = lambda name, value: self.observe(name, value)
        self._ends = ends_of(model)

    # Requests

    def submit(  # noqa: PLR0913
        self,
        prompt: Sequence[int] | str,
        sampling: Sampling | None = None,
        *,
        segments: Sequence[Named] = (),
        boundary: Boundary | None = None,
        priority: int = 0,
        timeout: float | int | None = None,
        callback: Callable[[Request, Any], Any] | None = None,
        source: Callable[[], Any] | None = None,
        answered: Sequence[int] = (),
    ) -> Request:
        """Hands a request in, from any thread; it is served by `start`ed engines, and by calls of `step`.

        Args:
            prompt: Ids, or text where the engine has a tokenizer.
            sampling: How tokens are chosen; greedy by default.
            segments: Documents that stand before the prompt, in order: addresses in the engine's store, what `add`
                returned, or texts and ids, which are stored when they are first needed.
            boundary: What of each segment is recomputed in its place, as `assemble` has it; a tenth by default.
            priority: Larger ones come first.
            timeout: Seconds after which it is given up, wherever it stands.
            callback: Called with the request and each `Token` as it comes, and `None` at the end, by the engine's
                thread; what it raises ends the request.
            source: Makes the `Span` that the prompt begins with, read elsewhere under the same plan.
            answered: Ids of an answer that another engine has begun, which goes on behind them as it would have there:
                they count for its length, its penalties, its stop strings and the draws of its seed, and are not
                called back. Without a seed what follows is drawn anew.

        Raises:
            ValueError: The request can never be served; says what it needs and what there is, or which segment is
                not known.
            QueueFullError: Too many wait.
            RuntimeError: The engine has ended, or is being drained.
        """
        more: Any = {"priority": priority, "timeout": timeout, "callback": callback, "source": source}
        more["answered"] = answered
        return self.submit_many(prompt, 1, sampling, segments=segments, boundary=boundary, **more)[0]

    def submit_many(  # noqa: PLR0913
        self,
        prompt: Sequence[int] | str,
        n: int,
        sampling: Sampling | None = None,
        *,
        segments: Sequence[Named] = (),
        boundary: Boundary | None = None,
        priority: int = 0,
        timeout: float | int | None = None,
        callback: Callable[[Request, Any], Any] | None = None,
        source: Callable[[], Any] | None = None,
        answered: Sequence[int] = (),
    ) -> list[Request]:
        """`n` answers to one prompt, which is read once: the others are forks. Seeds are the first one's and on."""
        self.ranks.check_leads()
        self.ranks.check_alone(source=source)
        sampling = sampling or Sampling()
        parts = scheduled(segments, boundary, source, self)
        ids = ids_of(prompt, self, first=not parts)
        check_request(ids, sampling, n, self, parts)
        answered = check_answered(answered, sampling, n, self.words)
        ids = [*chain.from_iterable(part.ref.ids for part in parts), *ids]
        made: list[scheduling.Sequence] = []
        for i in range(n):
            mine = sampling if sampling.seed is None or not i else replace(sampling, seed=sampling.seed + i)
            request = Request(ids, mine, priority, timeout, callback)
            request.source, request.segments, request.served = source, parts, self._serves
            request.tokens = [Token(i) for i in answered]
            begun = {"sampled": len(answered), "after": made[0] if made else None}
            made.append(scheduling.Sequence(request, [*ids, *answered], **begun))
        self._inbox.put(made, len(self.scheduler.waiting))
        return [sequence.request for sequence in made]

    def add_segment(self, text: Ids | str, prefix: Ids | SegmentRef | None = None) -> SegmentRef:
        """Stores a document between two steps; its `address` then names it in requests. From any thread.

        Args:
            text: The document, or its ids.
            prefix: What it is read behind; by default what the tokenizer begins texts with.

        Raises:
            ValueError: The engine has no store, or the document is none.
            RuntimeError: The engine has ended.
        """
        documents = store_of(self)
        return self.between_steps(lambda: documents.add(text, prefix))

    def generate(
        self, prompts: Iterable[Sequence[int] | str], sampling: Sampling | Sequence[Sampling] | None = None,
        *, progress: bool = False,
    ) -> list[Request]:  # fmt: skip
        """Answers to all prompts, in their order; each is a request that has ended (`.ids`, `.reason`, `.error`).

        Args:
            prompts: Ids or texts.
            sampling: One for all, or one for each.
            progress: Shows a bar.
        """
        texts = list(prompts)
        each = [sampling] * len(texts) if sampling is None or isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(texts):
            raise ValueError(f"{len(each)} samplings for {len(texts)} prompts: give one, or one for each")
        self._check_outside("generate")
        requests = [self.submit(text, how) for text, how in zip(texts, each, strict=True)]
        self._until_ended(requests, progress)
        return requests

    @property
    def waiting(self) -> int:
        """Requests that hold no pages yet, or none any more."""
        return len(self.scheduler.waiting) + len(self._inbox)

    @property
    def running(self) -> int:
        """Requests that hold pages."""
        return len(self.scheduler.running)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._inbox or self.scheduler.waiting or self.scheduler.running or self.reader.pending)

    # Steps

    @torch.no_grad()
    def step(self) -> bool:
        """Does one step: a token for each that decodes, chunks for those that read; whether there was work."""
        self.ranks.check_leads()
        self._check_outside("step")
        with self._turn():
            self._begun = True
            self._inbox.answer()
            new, gone = list(self._arrived()), list(self.scheduler.given_up(time.monotonic()))
            with self.ranks.together():
                self.ranks.told(Orders.of(new, gone) if self.ranks.count > 1 else None)
                return self._step(gone)

    @torch.no_grad()
    def follow(self) -> None:
        """Does the steps of rank 0, on every other, until the engine is shut down there.

        Raises:
            RuntimeError: A rank has gone or takes too long, or this one has nobody to follow.
        """
        self.ranks.check_follows()
        try:
            with self.ranks.together():
                while not (orders := self.ranks.told(Orders())).over:
                    self._step(orders.taken(self.scheduler))
        finally:
            self._end_all(State.CANCELLED, "shutdown", None)

    def _step(self, gone: Iterable[tuple[scheduling.Sequence, str]]) -> bool:
        for sequence, why in gone:
            self._finish(sequence, State.CANCELLED, why, None)
        work = self.scheduler.plan()
        self.steps += bool(work)
        self.reader.run(work)
        return bool(work) or bool(self.reader.pending)

    def _arrived(self) -> Iterator[scheduling.Sequence]:
        for sequence in self._inbox.take():
            if self.reader.begin(sequence, self._ends, self.tokenizer):
                self.scheduler.add(sequence)
                yield sequence

    def _finish(self, sequence: Any, state: State, reason: str, error: BaseException | None) -> None:
        if sequence.seat is not None:
            self.reader.seats.forget(sequence.seat)
        self.scheduler.remove(sequence)
        sequence.request.end(state, reason, error)
        self.observe(reason, 1)

    def _end_all(self, state: State, reason: str, error: BaseException | None) -> None:
        with ExitStack() as ends:
            ends.callback(self.reader.close)
            ends.callback(self.ranks.end, Orders(over=True) if error is None else None)
            for sequence in self._inbox.take():
                sequence.request.end(state, reason, error)
            for sequence in [*self.scheduler.waiting, *self.scheduler.running]:
                self._finish(sequence, state, reason, error)

    def _patience(self) -> float:
        return 0.02 if self.scheduler.waiting else 0.2
