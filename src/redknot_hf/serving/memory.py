"""Pages of all sequences: one budget of bytes, shared out among the layers once, and a cache for every sequence.

A sequence is a `RedKnotCache` of one row a head: a fork of an empty root, whose pools are of a fixed size, so that all
forks take their pages from the same pools. How many pages a length needs is known beforehand, and how many are free is
counted by the pools, so what fits is exact, shared pages included.

    budget = rings x (pages of all local rows of a sequence) + columns x (one page of every row that keeps everything)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from redknot_hf.cache.argument import cache_argument
from redknot_hf.cache.cache import RedKnotCache, row_layers
from redknot_hf.cache.layer import RedKnotLayer
from redknot_hf.cache.pool import PagePool
from redknot_hf.cache.span import Span
from redknot_hf.cache.storage import Storage
from redknot_hf.plan.plan import HeadPlan

from .prefixes import Prefixes
from .scheduler import Sequence
from .sizes import Sizes, bytes_of


class SeatMemory:
    """The pages of an engine's sequences, on the device and, of those that were swapped out, on the host.

    Args:
        model: Runs once, so that layers know their shape.
        plan: What heads keep.
        memory: Bytes of pages, or the share of what is free on the device.
        seats: Sequences that have pages at most.
        longest: Tokens of a sequence at most.
        page_size, impl: Of the cache.
        host: Bytes on the host for sequences that are swapped out.
        parked: Share of the pages that prefixes kept for later may hold; 0 keeps none.

    Raises:
        ValueError: A layer keeps more than keys and values, or the memory is too small for a sequence.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: Any,
        plan: HeadPlan,
        memory: float | int | str,
        seats: int,
        longest: int,
        *,
        page_size: int = 64,
        impl: str | None = None,
        host: int = 8 << 30,
        parked: float | int = 0.5,
    ) -> None:
        self.model = model
        self.root = RedKnotCache(model.config, plan, page_size=page_size, impl=impl)
        _check_layers(self.root)
        self.name = next(iter(cache_argument(model, self.root)))
        device = model.get_input_embeddings().weight.device
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True, **{self.name: self.root})
        self.root.crop(-1)
        self.layers = {i: layer.storage for i, layer in row_layers(self.root) if layer.is_initialized}
        self.page_size, self.host, self.host_used = page_size, host, 0
        self.freed = 0
        self.sizes = self._sizes(bytes_of(memory, device), seats, longest, 2 if parked else 1)
        for storage in self.layers.values():
            self._settle_pool(storage)
        # Layers of equal rules hold the same pages of every sequence, so that one of them speaks for all.
        self.kinds = list({storage.rows.rules: i for i, storage in self.layers.items()}.values())
        self.prefixes = Prefixes(int(self.sizes.nbytes * parked), page_size, _reaches)

    # What the scheduler asks

    def begin(self, sequence: Sequence) -> int:
        """A fork of the longest prefix that is parked, or of the empty root."""
        request = sequence.request
        if request.source is not None:  # as if it had been swapped out
            sequence.held, sequence.swapped, sequence.reserved = request.source, True, 0
            request.cached = request.source.tokens
            return request.source.tokens
        found = self.prefixes.find(sequence.tokens, request.segments)
        tokens = 0 if found is None else found[1]
        sequence.held, sequence.reserved = (self.root if found is None else found[0].cache).fork(), 0
        if found is not None and found[0].tokens > tokens:
            sequence.held.crop(tokens - found[0].tokens)
        if not sequence.sampled:
            request.cached = tokens
        return tokens

    def fits(self, sequence: Sequence, tokens: int) -> bool:
        """Whether there are free pages for so many tokens, copies of shared ones included."""
        if sequence.swapped:
            wanted = np.array([tokens])
            return all(self.layers[i].rows.pages_needed(wanted).sum() <= self.layers[i].pool.free for i in self.kinds)
        layers = sequence.held.layers
        return all(_missing(layers[i].storage, tokens) <= self.layers[i].pool.free for i in self.kinds)

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Gives a sequence pages of its own for so many tokens."""
        self.sync(sequence)
        lengths = np.array([tokens])
        for i in self.layers:
            sequence.held.layers[i].storage.reserve(lengths)
        sequence.reserved = -(-tokens // self.page_size) * self.page_size

    def release(self, sequence: Sequence) -> None:
        """Takes everything from a sequence."""
        if sequence.swapped:
            self._left_host(sequence)
        elif sequence.held is not None:
            self._drop(sequence.held)
        sequence.held, sequence.reserved, sequence.swapped = None, 0, False

    def evict(self) -> bool:
        """Lets the prefix go that was used least recently."""
        entry = self.prefixes.pop()
        if entry is not None:
            self._drop(entry.cache)
        return entry is not None

    def swap_out(self, sequence: Sequence) -> bool:
        """Moves what a sequence holds to the host."""
        self.sync(sequence)
        room = self.host - self.host_used
        if self.needs(sequence.done) > room:
            return False
        span = sequence.held.spans()[0]
        data = torch.empty(span.data.shape, dtype=span.data.dtype, pin_memory=span.data.device.type == "cuda")
        data.copy_(span.data)
        self._drop(sequence.held)
        sequence.held = Span(span.tokens, span.layers, data)
        self.host_used += data.nbytes
        return True

    def swap_in(self, sequence: Sequence) -> None:
        """Brings it back."""
        self._left_host(sequence)
        sequence.held = self._adopt(sequence.held)

    # What the engine asks besides

    def sync(self, sequence: Sequence) -> None:
        """Tells a sequence's cache of the tokens that steps of decoding have written."""
        for i in self.layers:
            storage = sequence.held.layers[i].storage
            more = sequence.done - int(storage.rows.lengths[0])
            if more > 0:
                with storage.pool.lock:
                    storage.rows.advance(np.array([more]))
                    storage.history.add(more)

    def park(self, sequence: Sequence) -> None:
        """Keeps what a sequence holds now for others that begin alike, if there is room for it to go on."""
        tokens = sequence.tokens[: sequence.done]
        kind = sequence.request.segments
        if not self.prefixes.wants(tokens, kind):
            return
        self.sync(sequence)
        reserved = sequence.reserved
        kept = sequence.held.fork()
        if self.fits(sequence, max(reserved, sequence.done)):
            for entry in self.prefixes.add(tokens, kept, self.needs(len(tokens)), kind):
                self._drop(entry.cache)
        else:
            self._drop(kept)
        if reserved > sequence.done:
            self.grow(sequence, reserved)

    def needs(self, tokens: int) -> int:
        """Bytes of a sequence of so many tokens that shares nothing."""
        wanted = np.array([tokens])
        return sum(int(x.rows.pages_needed(wanted).sum()) * _page_bytes(x) for x in self.layers.values())

    def ever_fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens fits where nothing else is held."""
        wanted = np.array([tokens])
        return all(x.rows.pages_needed(wanted).sum() <= x.pool.size for x in self.layers.values())

    def used(self) -> dict[str, int]:
        """Bytes: of all pages, of those in use, of those of local and of other heads, and on the host."""
        total = sum(x.pool.nbytes for x in self.layers.values())
        free = sum(x.pool.free * _page_bytes(x) for x in self.layers.values())
        return {"total": total, "used": total - free, "host": self.host_used, "parked": self.prefixes.nbytes}

    def _left_host(self, sequence: Sequence) -> None:
        if sequence.held is not sequence.request.source:
            self.host_used -= sequence.held.data.nbytes

    def _adopt(self, span: Span) -> RedKnotCache:
        """A cache in the pools that holds a span; pages must be free."""
        cache = self.root.fork()
        device = next(iter(self.layers.values())).device
        cache.extend([Span(span.tokens, span.layers, span.data.to(device, non_blocking=True))])
        return cache

    def _drop(self, cache: RedKnotCache) -> None:
        self.freed += 1
        for i in self.layers:
            storage = _storage(cache, i)
            with storage.pool.lock:
                storage.rows.cut(np.zeros(1, np.int64))

    def _sizes(self, budget: int, seats: int, longest: int, times: int) -> Sizes:
        """As many columns as the budget buys beside the rings; no more than can ever be used."""
        ring = sum(_page_bytes(x) * _local_pages(x) for x in self.layers.values())
        column = sum(_page_bytes(x) * len(x.rows.rules.global_heads) for x in self.layers.values())
        whole = -(-longest // self.page_size)
        rings = seats * times
        if column == 0:
            rings = min(rings, budget // ring)
            columns = whole
        else:
            # Half of the budget, or more where sequences of half the greatest length want more.
            bought = max(0.5 * budget // ring, budget // (ring + whole * column / 2)) if ring else rings
            rings = max(min(rings, int(bought)), 1)
            columns = min((budget - rings * ring) // column, seats * whole * times)
        sizes = Sizes(ring, column, rings, columns, self.page_size)
        if rings < 1 or columns < 1:
            raise ValueError(
                f"memory={budget:,} bytes: the local heads of one sequence need {ring:,} and one page of the others "
                f"{column:,}; give more memory, or a plan that keeps less"
            )
        return sizes

    def _settle_pool(self, storage: Storage) -> None:
        """Gives a layer of the root the pool of its final size, which all forks will share."""
        rows, old = storage.rows, storage.pool.pages
        pages = self.sizes.rings * _local_pages(storage) + self.sizes.columns * len(rows.rules.global_heads)
        dims = old.keys.shape[-1], old.values.shape[-1]
        storage.pool = PagePool(self.page_size, dims, old.keys.dtype, storage.device, pages)
        storage.pool.hold(rows)


def _storage(cache: RedKnotCache, index: int) -> Storage:
    layer: Any = cache.layers[index]
    return layer.storage


def _missing(storage: Storage, tokens: int) -> int:
    """Pages that rows of one sequence lack for so many tokens, copies of those that others list too included."""
    rows, references = storage.rows, storage.pool.references
    wanted = np.array([tokens])
    missing = rows.pages_missing(wanted)
    if not references.shared or rows.has_room(wanted):
        return missing
    table, size = rows.table[0], rows.rules.page_size
    first = np.zeros(rows.rules.heads, np.int64)
    first[list(rows.rules.global_heads)] = int(rows.lengths[0]) // size
    written = (np.arange(table.shape[1]) >= first[:, None]) & (table >= 0)
    return missing + int((references.counts[table[written]] > 1).sum())


def _reaches(cache: RedKnotCache, cut: int) -> bool:
    """Whether all rows of a sequence can be cut back by so many tokens."""
    layers = (layer for _, layer in row_layers(cache) if layer.is_initialized)
    return cut == 0 or all(layer.storage.missing_after_cut(cut) == 0 for layer in layers)


def _local_pages(storage: Storage) -> int:
    rules = storage.rows.rules
    return sum(rules.max_pages[h] for h in range(rules.heads) if h not in rules.global_heads)


def _page_bytes(storage: Storage) -> int:
    return sum(part[:1].numel() * part.element_size() for part in _one_page(storage))


def _one_page(storage: Storage) -> list[torch.Tensor]:
    pages = storage.pool.pages
    return [part.new_empty(1, *part.shape[1:]) if not len(part) else part for part in pages]


def _check_layers(cache: RedKnotCache) -> None:
    other = [type(x).__name__ for x in cache.layers if not isinstance(x, RedKnotLayer)]
    other = [name for name in other if name != "DummyLayer"]
    if other:
        raise ValueError(
            f"the model keeps a {other[0]} beside keys and values, which cannot be shared out in pages: serve it with "
            "model.generate"
        )
