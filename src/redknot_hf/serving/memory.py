"""Pages of all sequences: one budget of bytes, shared out among the layers once, and a cache for every sequence.

A sequence is a `RedKnotCache` of one row a head: a fork of an empty root, whose pools are of a fixed size, so that all
forks take their pages from the same pools. How many pages a length needs is known beforehand, and how many are free is
counted by the pools, so what fits is exact, shared pages included.

    budget = rings x (pages of all local rows of a sequence) + columns x (one page of every row that keeps everything)

Rows stored in fewer bits have part in both: their hot ends are as local rows, and a column has a cold page of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from redknot_hf.attention.devices import input_device
from redknot_hf.cache.argument import cache_argument
from redknot_hf.cache.cache import RedKnotCache, row_layers
from redknot_hf.cache.layer import RedKnotLayer
from redknot_hf.cache.span import Span
from redknot_hf.cache.storage import Storage
from redknot_hf.plan.plan import HeadPlan

from .host import Away, HostBlocks
from .pages import column_bytes, missing, needed, page_bytes, reserve, ring_bytes, ring_pages
from .prefixes import Prefixes
from .ranks import Ranks
from .scheduler import Sequence
from .sizes import Sizes, bought, bytes_of, is_share
from .sizes import longest as longest_of


class SeatMemory:
    """The pages of an engine's sequences, on the device and, of those that were swapped out, on the host.

    Args:
        model: Runs once, so that layers know their shape.
        plan: What heads keep.
        memory: Bytes of pages, or the share of what is free on each device.
        seats: Sequences that have pages at most.
        longest: Tokens of a sequence at most.
        page_size, impl: Of the cache.
        host: Bytes on the host for sequences that are swapped out.
        parked: Share of the pages that prefixes kept for later may hold; 0 keeps none.
        ranks: That share the model. What is asked of the memory of one is answered for all: what fits, fits on each.

    Attributes:
        longest: Tokens of the longest sequence that fits where nothing else is held.
        moved: Sequences that may have got other pages; who has heard of one takes it out.

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
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.ranks = model, ranks or Ranks()
        self.root = RedKnotCache(model.config, plan, page_size=page_size, impl=impl)
        _check_layers(self.root)
        self.name = next(iter(cache_argument(model, self.root)))
        self.device = input_device(model)
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=True, **{self.name: self.root})
        self.root.crop(-1)
        self.layers = {i: layer.storage for i, layer in row_layers(self.root) if layer.is_initialized}
        self.page_size, self.host, self.host_used = page_size, host, 0
        self.freed, self.moved = 0, set[Sequence]()
        self.sizes = self._sizes(memory, seats, longest, 2 if parked else 1)
        for storage in self.layers.values():  # all forks share these pools
            rings, columns = self.sizes.rings, self.sizes.columns
            storage.settle(rings * ring_pages(storage) + columns * len(storage.rows.rules.global_heads), columns)
        # Layers of equal rules hold the same pages of every sequence, so that one of them speaks for all.
        rules = {storage.rows.rules for storage in self.layers.values()}
        self._alike = [[i for i, x in self.layers.items() if x.rows.rules == one] for one in rules]
        self.kinds = [alike[0] for alike in self._alike]
        # Rules by which rows grow cold, which are the same in all layers with stored heads; `None` without any.
        self.stored = next((x.rows.rules for x in self.layers.values() if x.rows.rules.stored_heads), None)
        kept = self.ranks.most(int(self.sizes.nbytes * parked))
        self.prefixes = Prefixes(kept, page_size, lambda cache, cut: self.ranks.all(_reaches(cache, cut)))
        self.longest = self.ranks.least(longest_of(self._ever_fits, longest))
        self.blocks = HostBlocks(self.device.type == "cuda", min(host, self.needs(self.longest)))

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
        return self.ranks.all(self._fits(sequence, tokens))

    def _fits(self, sequence: Sequence, tokens: int) -> bool:
        held = sequence.held
        if isinstance(held, Away):
            wanted = [(held.needs(i, self.layers[i], tokens), self.layers[i]) for i in self.kinds]
            return all(n <= x.pool.free for counts, s in wanted for n, x in zip(counts, s.held(0), strict=True))
        if sequence.swapped:  # what was made elsewhere
            return all(needed(x) <= x.pool.free for i in self.kinds for x in self.layers[i].held(tokens))
        return all(missing(x) <= x.pool.free for i in self.kinds for x in _storage(held, i).held(tokens))

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Gives a sequence pages of its own for so many tokens."""
        self.sync(sequence)
        self.moved.add(sequence)
        sequence.reserved = -(-tokens // self.page_size) * self.page_size
        storages = self._storages(sequence.held)
        for alike in self._alike:
            reserve([storages[i] for i in alike], sequence.reserved)

    def release(self, sequence: Sequence) -> None:
        """Takes everything from a sequence."""
        self.moved.discard(sequence)
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

    def close(self) -> None:
        """Gives all pages to the device, whoever still holds a sequence: there is no further step."""
        while self.evict():
            pass
        self.blocks.clear()
        for storage in self.layers.values():
            storage.let_go()

    def swap_out(self, sequence: Sequence) -> bool:
        """Moves what a sequence holds to the host."""
        self.sync(sequence)
        room = self.host - self.host_used
        if not self.ranks.all(self.needs(sequence.done) <= room):
            return False
        away = Away.of(self._storages(sequence.held), self.blocks)
        self._drop(sequence.held)
        sequence.held = away
        self.host_used += away.nbytes
        return True

    def swap_in(self, sequence: Sequence) -> None:
        """Brings it back."""
        held, cache = sequence.held, self.root.fork()
        if isinstance(held, Away):
            held.back(self._storages(cache))
            self._left_host(sequence)
        else:
            early = self.device.type != "cpu"  # the host would read at once what a device still writes
            cache.extend([Span(held.tokens, held.layers, held.data.to(self.device, non_blocking=early))])
        sequence.held = cache

    # What the engine asks besides

    def sync(self, sequence: Sequence) -> None:
        """Tells a sequence's cache of the tokens that steps of decoding have written."""
        for i in self.layers:
            storage = sequence.held.layers[i].storage
            more = sequence.done - int(storage.rows.lengths[0])
            if more > 0:
                storage.told(more)

    def count(self, lengths: Int[Tensor, " seats"], cold: Int[Tensor, " seats"]) -> None:
        """Counts on the device what kernels have let grow cold in rows that came to these lengths; mutates `cold`."""
        if self.stored is not None:
            grown: Any = self.stored.cold_pages(lengths)
            torch.maximum(cold, grown.to(torch.int32), out=cold)

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
            nbytes = self.ranks.most(self.needs(len(tokens)))
            for entry in self.prefixes.add(tokens, kept, nbytes, kind):
                self._drop(entry.cache)
        else:
            self._drop(kept)
        if reserved > sequence.done:
            self.grow(sequence, reserved)

    def needs(self, tokens: int) -> int:
        """Bytes of a sequence of so many tokens that shares nothing."""
        return sum(needed(x) * page_bytes(x.pool) for s in self.layers.values() for x in s.held(tokens))

    def ever_fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens fits where nothing else is held."""
        return tokens <= self.longest

    def _ever_fits(self, tokens: int) -> bool:
        return all(needed(x) <= x.pool.size for s in self.layers.values() for x in s.held(tokens))

    def used(self) -> dict[str, int]:
        """Bytes: of all pages, of those in use, of parked prefixes, and on the host."""
        pools = [x.pool for s in self.layers.values() for x in s.held(0)]
        total = sum(pool.nbytes for pool in pools)
        free = sum(pool.free * page_bytes(pool) for pool in pools)
        return {"total": total, "used": total - free, "host": self.host_used, "parked": self.prefixes.nbytes}

    def _storages(self, cache: RedKnotCache) -> dict[int, Storage]:
        return {i: _storage(cache, i) for i in self.layers}

    def _left_host(self, sequence: Sequence) -> None:
        if isinstance(sequence.held, Away):
            self.host_used -= sequence.held.nbytes
            self.blocks.give(sequence.held.blocks)

    def _drop(self, cache: RedKnotCache) -> None:
        self.freed += 1
        for i in self.layers:
            storage = _storage(cache, i)
            with storage.pool.lock:
                storage.rows.cut(np.zeros(1, np.int64))
                storage.cold.cut(np.zeros(1, np.int64))

    def places(self) -> dict[torch.device, dict[int, Storage]]:
        """The layers of each device, in order."""
        found: dict[torch.device, dict[int, Storage]] = {}
        for i, storage in self.layers.items():
            found.setdefault(storage.device, {})[i] = storage
        return found

    def _sizes(self, memory: float | int | str, seats: int, longest: int, times: int) -> Sizes:
        """What the memory buys: bytes are for all devices of the rank together, a share is of what is free on each."""
        parts = self.places() if is_share(memory) else {self.device: self.layers}
        costs = [(bytes_of(memory, d), ring_bytes(x.values()), column_bytes(x.values())) for d, x in parts.items()]
        budget, ring, column = map(sum, zip(*costs, strict=True))
        whole = -(-longest // self.page_size)
        rings, columns = bought(costs, seats, whole, times, self.ranks.least)
        if not self.ranks.most(column):
            columns = whole
        sizes = Sizes(ring, column, rings, columns, self.page_size)
        if rings < 1 or columns < 1:
            raise ValueError(
                f"memory={budget:,} bytes: the local heads of one sequence need {ring:,} and one page of the others "
                f"{column:,}; give more memory, or a plan that keeps less"
            )
        return sizes


def _storage(cache: RedKnotCache, index: int) -> Storage:
    layer: Any = cache.layers[index]
    return layer.storage


def _reaches(cache: RedKnotCache, cut: int) -> bool:
    """Whether all rows of a sequence can be cut back by so many tokens."""
    layers = (layer for _, layer in row_layers(cache) if layer.is_initialized)
    return cut == 0 or all(layer.storage.missing_after_cut(cut) == 0 for layer in layers)


def _check_layers(cache: RedKnotCache) -> None:
    other = [type(x).__name__ for x in cache.layers if not isinstance(x, RedKnotLayer)]
    other = [name for name in other if name != "DummyLayer"]
    if other:
        raise ValueError(
            f"the model keeps a {other[0]} beside keys and values, which cannot be shared out in pages: serve it with "
            "model.generate"
        )
