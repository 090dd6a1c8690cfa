"""Stored documents as clients name them: by address, as text, or as ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from redknot_hf.serving.documents import is_address

from .bodies import Asked
from .errors import RequestError
from .prompts import Prompts
from .served import Served

if TYPE_CHECKING:
    from redknot_hf.reuse.segment import SegmentRef
    from redknot_hf.serving.documents import Documents

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Context:
    """What stands before a prompt.

    Attributes:
        refs: Segments, in order.
        boundary: What of each is recomputed in its place; `None` as usual.
        tokens: Of all, and of what comes before the first of them.
    """

    refs: tuple[SegmentRef, ...] = ()
    boundary: Any = None
    tokens: int = 0


class Library:
    """The documents of an engine.

    Args:
        engine: With a store, or none.
        prompts: Reads texts.
    """

    def __init__(self, engine: Served, prompts: Prompts) -> None:
        self.engine, self.prompts = engine, prompts

    async def before(self, asked: Asked, head: Sequence[int] = ()) -> Context:
        """What a request wants before its prompt.

        Args:
            asked: By a client; it may name segments.
            head: Ids that come before them all; read once and kept as a segment too.

        Raises:
            RequestError: A segment is not known, or none are stored here.
        """
        if not asked.segments:
            if asked.boundary is not None:
                raise RequestError(400, "boundary needs segments: name some, or leave it out", param="boundary")
            return Context()
        self._check()
        texts = [await self._read(one) for one in asked.segments]
        boundary = asked.boundary
        if head and isinstance(boundary, list):
            boundary = [0, *boundary]
        return await _apart(partial(self._before, head, texts, boundary))

    async def add(self, text: str | Sequence[int], prefix: str | Sequence[int] | None) -> SegmentRef:
        """Stores a text between two steps of the engine.

        Args:
            text: Or its ids.
            prefix: What it is read behind: a text, ids, or an address; by default what the tokenizer begins with.

        Raises:
            RequestError: It is too long, or no text of the model's, or none are stored here.
        """
        documents = self._check()
        ids = await self._read(text, named=False)
        behind = None if prefix is None else await self._read(prefix)
        if isinstance(behind, str):
            behind = await _apart(partial(documents.named, behind), "prefix")
        length = len(ids) + (0 if behind is None else len(behind))
        if not ids or length > self.engine.max_len:
            raise RequestError(
                400, f"a segment of {length} tokens: give 1 to {self.engine.max_len}, what it is read behind included"
            )
        if max([*ids, *(behind if isinstance(behind, list) else ())]) >= self.engine.words:
            raise RequestError(400, f"the model knows ids from 0 to {self.engine.words - 1}", param="input")
        return await _apart(partial(self.engine.add_segment, ids, behind))

    def _check(self) -> Documents:
        if self.engine.documents is None:
            raise RequestError(400, "this server stores no segments: start it with --store", param="segments")
        return self.engine.documents

    async def _read(self, one: str | Sequence[int], named: bool = True) -> Any:
        """An address as it is, and everything else as ids."""
        if not isinstance(one, str) or (named and is_address(one)):
            return one
        return await self.prompts.read(one, first=False)

    def _before(self, head: Sequence[int], texts: Sequence[Any], boundary: Any) -> Context:
        documents = self._check()
        refs = [documents.named(one) for one in texts]
        if head:
            opening = documents.opening
            behind = opening if opening and tuple(head[: len(opening)]) == opening else ()
            if rest := head[len(behind) :]:
                refs.insert(0, documents.store.ref(rest, behind or None))
            elif isinstance(boundary, list):
                boundary = boundary[1:]
        parts = documents.schedule(refs, boundary)
        return Context(tuple(refs), boundary, sum(len(part.ref) for part in parts))


async def _apart(work: Callable[[], _Made], param: str = "segments") -> _Made:
    """Something that may wait for a disk, another machine or the engine, off the event loop."""
    try:
        return await asyncio.to_thread(work)
    except ValueError as e:
        raise RequestError(400, str(e), "invalid_value", param) from e
    except RuntimeError as e:
        raise RequestError(503, "the server is being shut down", "shutting_down", retry_after=5) from e
