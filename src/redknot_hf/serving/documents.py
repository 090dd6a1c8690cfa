"""Documents in requests: stored once, named by address, text or ids, and assembled into an engine's pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.profiler import record_function

from redknot_hf.plan.plan import HeadPlan
from redknot_hf.reuse.assemble import relocation_of
from redknot_hf.reuse.assembly import Assembly
from redknot_hf.reuse.ids import Ids
from redknot_hf.reuse.schedule import BOUNDARY, Amount, Boundary, Reused, is_spliced, passes, schedule
from redknot_hf.reuse.segment import SegmentRef

from .scheduler import Sequence as Served

Named = SegmentRef | Ids | str


class Documents:
    """What a store's segments are to an engine.

    Args:
        store: Of the engine's model and plan; or what gives the names that it gives (`ref`, `named`, `verdict`).
        model, plan: The engine's.
        chunk: Tokens that are recomputed in a step at most.
        tokenizer: For texts; what it begins every text with, contexts begin with.

    Raises:
        ValueError: The store is another model's, or of another plan.
    """

    def __init__(self, store: Any, model: Any, plan: HeadPlan, chunk: int, tokenizer: Any) -> None:
        if store.model is not model:
            raise ValueError("the store's segments belong to another model: make a SegmentStore of the engine's")
        if store.plan != plan:
            raise ValueError("the store has another plan than the engine: give both the same")
        self.store, self.chunk, self.tokenizer = store, chunk, tokenizer
        self.opening: tuple[int, ...] = () if tokenizer is None else tuple(tokenizer("")["input_ids"])
        store.verdict()  # now, since it runs the model

    def ids(self, text: Ids | str) -> Ids:
        """Ids of a text that stands behind others, as a tokenizer has them without what it begins texts with.

        Raises:
            ValueError: It is text, and there is no tokenizer.
        """
        if not isinstance(text, str):
            return text
        if self.tokenizer is None:
            raise ValueError("a segment is text: give ids or its address, or make the engine with a tokenizer")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def named(self, one: Named) -> SegmentRef:
        """The segment that a request names: as it is, by its address, or by its text or ids.

        Raises:
            ValueError: Nobody has added a text of this address, or it is no text.
        """
        if isinstance(one, SegmentRef):
            return one if one.store is self.store else self.store.named(one.address)
        if isinstance(one, str) and is_address(one):
            return self.store.named(one)
        return self.store.ref(self.ids(one), self.opening or None)

    def add(self, text: Ids | str, prefix: Ids | SegmentRef | None = None) -> SegmentRef:
        """Stores a text as requests that bring it would name it; as `SegmentStore.add`."""
        return self.store.add(self.ids(text), (self.opening or None) if prefix is None else prefix)

    def schedule(self, wanted: Sequence[Named], boundary: Boundary | None) -> tuple[Reused, ...]:
        """Where each segment of a request will stand, and what of it is recomputed there.

        Raises:
            ValueError: A segment is not known, the model's keys cannot be moved, or the boundary is none.
        """
        if isinstance(wanted, str | SegmentRef):
            raise ValueError(f"segments={wanted!r:.40}: give a list of them, [segment]")
        refs = [self.named(one) for one in wanted]
        if self.opening and refs and refs[0].prefix == self.opening:  # which nothing else would bring
            refs.insert(0, self.store.ref(self.opening))
        amount: Any = _shifted(boundary, len(refs) - len(wanted))
        parts = schedule(refs, BOUNDARY if amount is None else amount)
        if any(map(is_spliced, parts)):
            relocation_of(self.store, force=False)
        return parts

    def begin(self, sequence: Served, room: int) -> Assembling:
        """Begins to put a request's segments into what the memory holds of it, which holds nothing yet."""
        return Assembling(self, sequence.held, sequence.request.segments, room)


def is_address(text: str) -> bool:
    """Whether a text is written as addresses are."""
    return len(text) == 64 and not text.strip("0123456789abcdef")


class Assembling:
    """Segments on their way into one sequence.

    Attributes:
        cache: That takes them; mutated.
        done: Tokens that it has taken.

    Args:
        documents: Where segments are.
        cache: Of the engine's pages, with nothing in it.
        parts: The segments, in order.
        room: Tokens for which it has pages.
    """

    def __init__(self, documents: Documents, cache: Any, parts: Sequence[Reused], room: int) -> None:
        store = documents.store
        store.check_weights()
        self.cache, self.done = cache, 0
        self._store, self._room = store, np.array([room])
        self._relocation = relocation_of(store, force=False) if any(map(is_spliced, parts)) else None
        self._passes: Iterator[Any] = passes([parts], store, documents.chunk)

    def step(self) -> int:
        """Does one forward pass, of a chunk of tokens at most; how many tokens were recomputed."""
        chunks = next(self._passes)
        run = Assembly(self._store.model, self.cache, self._store, chunks, self._room, self._relocation)
        with record_function("redknot: assembly"):
            run.run()
        self.done = chunks[0][-1].end
        return len(run.places[0])


def _shifted(boundary: Any, by: int) -> Boundary | Callable[[SegmentRef, int], Amount] | None:
    """A boundary of each segment, where some were put before the first of them."""
    each = isinstance(boundary, Sequence) and not isinstance(boundary, str)
    return [0] * by + [*boundary] if each else boundary
