"""Segments on their way into a cache: one forward pass of all tokens to recompute, and stored ones put between them.

What is stored does not depend on what is recomputed, so no segment waits for the one before it to be read: the model
takes the boundaries of many segments at once. In every layer the context is laid out in order for a moment, stored
keys and new ones side by side; the new tokens attend over it, and then the rows take what they keep of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from redknot_kernels import UNBOUNDED, HeadRules, Pages, Rotation
from torch import Tensor
from torch.profiler import record_function

from redknot_hf.attention.devices import input_device
from redknot_hf.attention.mask import PaddingMask
from redknot_hf.cache.argument import cache_argument
from redknot_hf.cache.cache import RedKnotCache, row_layers
from redknot_hf.cache.handle import RedKnotHandle
from redknot_hf.cache.layer import RedKnotLayer, lengths_of
from redknot_hf.cache.packing import known, lay_out, splice
from redknot_hf.cache.pool import staged
from redknot_hf.cache.step import Step
from redknot_hf.cache.storage import Storage

from .relocation import Relocation
from .scattered import ScatteredPass, initialize
from .schedule import Chunk, Reused, originals, passes, spot
from .segment import Segment
from .store import SegmentStore

# Tokens that find room behind the segments, and of how many tokens of theirs one more does: a question follows as a
# rule, and a pool that must grow for it copies all that it holds.
ROOM = 64


def put(
    model: Any,
    cache: RedKnotCache,
    store: SegmentStore,
    batch: Sequence[Sequence[Reused]],
    relocation: Relocation | None,
) -> None:
    """Continues every sequence of a cache by segments; its pages are mutated.

    Args:
        model: The model of the store.
        cache: Holds as many sequences as there are lists, all with the same tokens, or nothing yet.
        store: Where the segments are.
        batch: What each sequence goes on by.
        relocation: How keys move; `None` if none has to.
    """
    ends = lengths_of(cache, len(batch)) + [sum(len(part.ref) for part in parts) for parts in batch]
    check_room(cache, int(ends.max()))
    room = ends + ends // ROOM + ROOM
    for index, chunks in enumerate(passes(batch, store)):
        assembly = Assembly(model, cache, store, chunks, room, relocation, alike=not index)
        with record_function("redknot: assembly"):
            assembly.run()


def check_room(cache: RedKnotCache, end: int) -> None:
    """Raises if a cache is too small for so many tokens.

    Raises:
        ValueError: They do not fit `max_cache_len`.
    """
    most = cache.get_max_length()
    if 0 <= most < end:
        raise ValueError(
            f"the segments reach to token {end} and exceed max_cache_len={most}: give a larger one, or none"
        )


class Assembly(ScatteredPass):
    """What the model takes for its cache in such a pass.

    Args:
        model, cache, store, relocation: As for `put`.
        batch: The chunks of the pass, of each sequence.
        room: Tokens of the sequences for which pages are reserved.
        alike: All sequences hold the same so far: those that go on by the same segments are laid out from one copy.
    """

    def __init__(
        self,
        model: Any,
        cache: RedKnotCache,
        store: SegmentStore,
        batch: Sequence[Sequence[Chunk]],
        room: Int[np.ndarray, " batch"],
        relocation: Relocation | None,
        alike: bool = False,
    ) -> None:
        super().__init__(layers=cache.layers)
        self.model, self.cache, self.batch, self.room = model, cache, batch, room
        self.places = [np.concatenate([np.arange(0), *(chunk.places for chunk in chunks)]) for chunks in batch]
        self._originals = originals(batch) if alike else list(range(len(batch)))
        parts = {spot(chunk.part): chunk.part for chunks in batch for chunk in chunks if chunk.rest}
        refs = {part.ref.address: part.ref for part in parts.values()}
        with record_function("redknot: fetch"):  # now, since what was lost is computed anew, by passes of its own
            self._held = dict(zip(refs, store.fetch([*refs.values()]), strict=True))
        with record_function("redknot: angles"):
            self._turns = {
                where: turns_of(part, self._held[part.ref.address].segment, relocation)
                for where, part in parts.items()
            }
        self._here: set[tuple[str, int]] = set()  # parts of segments that the current stream may use
        self._where: dict[tuple[int, torch.device], Int[Tensor, " tokens"]] = {}
        self._grown: dict[Any, Any] = {}

    def run(self) -> None:
        """Runs the chunks' tokens through the model, and puts what is stored in its place on the way."""
        longest = max(map(len, self.places))
        if not longest:
            if (first := next((chunk.part for chunks in self.batch for chunk in chunks), None)) is not None:
                initialize(self.cache, self.model, self._held[first.ref.address].segment, len(self.batch))
            for index, layer in row_layers(self.cache):
                self._splice(index, layer)
            return
        ids, places = np.zeros((2, len(self.batch), longest), np.int64)
        for b, chunks in enumerate(self.batch):
            ids[b, : len(self.places[b])] = [p.part.ref.ids[i] for p in chunks for i in p.tokens]
            places[b, : len(self.places[b])] = self.places[b]
        self.model(
            input_ids=torch.from_numpy(ids).to(input_device(self.model)), logits_to_keep=1,
            position_ids=torch.from_numpy(places).to(input_device(self.model)), **cache_argument(self.model, self),
        )  # fmt: skip

    @torch.compiler.disable(reason="segments are put into a cache in the middle of a step")  # pyright: ignore
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands the new keys and values on; the attention function will come back here with them."""
        keys, values = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(keys, RedKnotHandle):
            keys.redknot.attend = partial(self._attend, layer_idx)
        return keys, values

    def _attend(
        self, index: int, step: Step, query: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Float[Tensor, "batch tokens query_heads value_dim"]:
        """Attends the tokens of all chunks; a layer that shares the keys finds the context laid out in `step.past`."""
        if mask is not None and not isinstance(mask, PaddingMask):
            raise ValueError(
                f"{self.model.config.model_type} attends under a mask of its own, which says nothing of tokens put "
                "between others: pass boundary=0, or read the text without reuse"
            )
        storage = step.storage
        if step.past is None:
            step.past = self._all_laid_out(index, step)
            self._keep(index, storage, step.past)
        rules, (batch, heads, tokens, _) = storage.rows.rules.as_seen, query.shape
        first = step.tokens - tokens  # a layer that shares keys may want its last tokens alone
        out = query.new_zeros(batch, tokens, heads, step.value.shape[-1])
        for b, text in enumerate(step.past):
            if len(places := text.places[first:]):
                mine = query[b : b + 1, :, : len(places)]
                found = storage.kernels.attend_at(mine, text.keys[None], text.values[None], places, rules, **options)
                out[b, : len(places)] = found[0]
        return out

    def _all_laid_out(self, index: int, step: Step) -> list[_LaidOut]:
        """The contexts of all sequences; what those of the same segments share is put in place once."""
        found, left = [], Counter(self._originals)
        shared: dict[int, tuple[Tensor, Tensor]] = {}
        for b, like in enumerate(self._originals):
            if like not in shared:
                shared[like] = self._stored(index, step, like)
            left[like] -= 1
            context = tuple(x.clone() for x in shared[like]) if left[like] else shared.pop(like)
            found.append(self._laid_out(step, b, *context))
        return found

    def _stored(self, index: int, step: Step, sequence: int) -> tuple[Tensor, Tensor]:
        """What stands in a sequence's context, in order, up to the end of the pass; zeros where the new tokens go."""
        storage, chunks = step.storage, self.batch[sequence]
        rows, device = storage.rows, storage.device
        before, heads = int(rows.lengths[sequence]), rows.rules.heads
        end = chunks[-1].end if chunks else 0
        keys, values = (x.new_zeros(heads, end, x.shape[-1]) for x in (step.key, step.value))
        flat = keys.flatten(0, 1), values.flatten(0, 1)
        if before and len(self.places[sequence]):  # who asks nothing need not see it
            at = [rows.positions_held(sequence, head) for head in range(heads)]
            of = np.repeat(np.arange(heads), [len(x) for x in at])
            where = staged(of * end + np.concatenate(at), device).to(device, non_blocking=True)
            for text, held in zip(flat, storage.read(sequence, of, np.concatenate(at)), strict=True):
                text.index_copy_(0, where, held)
        rules, table = _of_text(rows.rules, end, device)
        pages = Pages(flat[0][:, None], flat[1][:, None])
        with record_function("redknot: splice"):
            for part in (chunk.part for chunk in chunks if chunk.rest):
                segment, turn = self._segment(part, index), self._turns[spot(part)][index]
                lay_out(storage, index, segment, pages, table, rules, (len(part.ref), part.boundary, part.start), turn)
        return keys, values

    def _laid_out(self, step: Step, sequence: int, keys: Tensor, values: Tensor) -> _LaidOut:
        """The context of one sequence with its new tokens, which are written into what is stored of it."""
        at = sequence, step.storage.device
        if at not in self._where:  # all layers of a device ask for the same
            self._where[at] = staged(self.places[sequence], at[1]).to(at[1], non_blocking=True)
        places = self._where[at]
        for text, new in ((keys, step.key), (values, step.value)):
            text.index_copy_(1, places, new[sequence, :, : len(places)])
        return _LaidOut(keys, values, places)

    def _keep(self, index: int, storage: Storage, laid: Sequence[_LaidOut]) -> None:
        """Lets the rows take what their rules keep."""
        storage.reserve(self.room)
        rows, heads = storage.rows, storage.rows.rules.heads
        everything, all_known = ((UNBOUNDED,) * heads, (0,) * heads), np.zeros(heads, np.int64)
        for b, (text, chunks) in enumerate(zip(laid, self.batch, strict=True)):
            grown = []
            for chunk in chunks:
                grown.append((chunk.stop - chunk.first, all_known))
                if chunk.rest:
                    part, segment = chunk.part, self._held[chunk.part.ref.address].segment
                    # Sequences of the same segments grow alike, and so do layers of the same rules.
                    which = spot(part), part.boundary, segment.layers[index], rows.rules
                    if which not in self._grown:
                        self._grown[which] = known(segment, index, rows.rules, part.start, part.boundary)
                    grown.append(self._grown[which])
            if chunks:
                span = text.keys.shape[1], int(rows.lengths[b]), 0
                storage.place(b, text.keys.flatten(0, 1), text.values.flatten(0, 1), everything, span, grown)
        storage.left_align()

    def _splice(self, index: int, layer: RedKnotLayer) -> None:
        """Puts segments of which nothing is recomputed into the rows."""
        for b, chunks in enumerate(self.batch):
            for chunk in chunks:
                layer.storage.reserve(self.room)
                with record_function("redknot: splice"):
                    splice(
                        layer.storage, index, b, self._segment(chunk.part, index), self._turns[spot(chunk.part)][index]
                    )
        layer.storage.left_align()

    def _segment(self, part: Reused, layer: int) -> Segment:
        """A segment whose layer, and those before it, the current stream may use from now on."""
        address = part.ref.address
        held = self._held[address]
        if (known := (address, held.part(layer))) not in self._here:
            self._here.add(known)
            held.here(layer)
        return held.segment


@dataclass(frozen=True, eq=False)
class _LaidOut:
    """A context in order, as far as its heads know it; zeros elsewhere.

    Attributes:
        keys, values: Of one layer and sequence.
        places: Where the tokens stand that run through the model.
    """

    keys: Float[Tensor, "heads text key_dim"]
    values: Float[Tensor, "heads text value_dim"]
    places: Int[Tensor, " tokens"]


def _of_text(rules: HeadRules, tokens: int, device: torch.device) -> tuple[HeadRules, Int[Tensor, "heads tokens"]]:
    """Rules and table under which a text in order is rows of pages of one token."""
    in_order = HeadRules(rules.window, rules.sink, (UNBOUNDED,) * rules.heads, 1, rules.reach)
    return in_order, _table(rules.heads, tokens, device)


@lru_cache(maxsize=1)  # all layers ask for the same
def _table(heads: int, tokens: int, device: torch.device) -> Int[Tensor, "heads tokens"]:
    return torch.arange(heads * tokens, dtype=torch.int32, device=device).view(heads, tokens)


def turns_of(part: Reused, segment: Segment, relocation: Relocation | None) -> Sequence[Rotation | None]:
    """How far the keys of a segment turn in each layer.

    Raises:
        ValueError: They have to turn, and there is no relocation.
    """
    if not part.moved:
        return [None] * len(segment.layers)
    if relocation is None:
        kind = "this model" if part.ref.store is None else part.ref.store.model.config.model_type
        raise ValueError(f"{kind}: its keys cannot be moved, and {part.ref} must be")
    there = torch.arange(len(part.ref)) + len(part.ref.prefix)
    return relocation.rotations(there, there - there[0] + part.start, segment.data.device)
