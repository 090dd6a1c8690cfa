"""What every KV head of a layer sees, and where its row keeps a token.

A *row* is the stored tokens of one KV head of one sequence: a list of pages that is read as one run of slots.

    global row   slot = position, pages are added for ever
    local row    | sink | ring .......................... |
                 0      sink                              sink + ring = pages * page_size
    stored row   as a local row: the first page, and a ring for the hot tail; what lies between is cold

The first `sink` tokens stay where they are; the others go round in the ring. Until the ring wraps, slot = position for
all kinds. The ring is at least one page longer than the window: a step of up to a page may be written before it is
read, and as many tokens may be taken back.

A stored row sees everything, but keeps most of it in cold pages of another pool, in 8 or 4 bits: cold page i holds the
positions from `(i + 1) * page_size` on. A page is quantised once, when it is full and lies behind the last `hot`
tokens. How many of a row's pages are cold is a count on the device: it never falls, and a row that is cut back within
its hot tail keeps what is cold.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

# Stands for "no bound" where a window, a ring or a number of pages is expected. It fits an int32 with room for sums.
UNBOUNDED = 2**30


@dataclass(frozen=True)
class HeadRules:
    """The rules of the KV heads of one layer; one entry a head.

    Attributes:
        window: Tokens a query sees back, itself included; `UNBOUNDED` for a global head.
        sink: First tokens that stay visible behind the window.
        ring: Slots behind the sink in which positions go round; `UNBOUNDED` for a global head.
        page_size: Tokens of a page.
        reach: The model's own sliding window: no query sees further, sinks included.
        storage: Bits of a cold page's elements, 8 or 4, for stored heads, and 0 for the others; empty if all are.
        hot: The last tokens of a stored row, of which none is cold.
    """

    window: tuple
    sink: tuple
    ring: tuple
    page_size: int
    reach: int = UNBOUNDED
    storage: tuple = ()
    hot: int = 0

    @classmethod
    def make(cls, window, sink, page_size, reach=UNBOUNDED, slack=0, storage=(), hot=0):
        """Sizes the rings: whole pages, with room for `max(slack, page_size)` tokens behind the window.

        The ring of a stored row has as much room behind its hot tail and a page that is not yet full. Its first page
        stays, as if it were a sink.
        """
        storage = tuple(storage) if any(storage) else ()
        ring, sink = [], list(sink)
        for h, (w, bits) in enumerate(zip(window, storage or (0,) * len(sink))):
            if bits:
                sink[h], w = page_size, hot + page_size
            pages = -(-(sink[h] + w + max(slack, page_size)) // page_size)
            ring.append(UNBOUNDED if w >= UNBOUNDED else pages * page_size - sink[h])
        return cls(tuple(window), tuple(sink), tuple(ring), page_size, reach, storage, hot)

    @property
    def heads(self):
        """Number of KV heads."""
        return len(self.window)

    @cached_property
    def max_pages(self):
        """The most pages a row of each head holds."""
        return tuple(UNBOUNDED if r >= UNBOUNDED else (s + r) // self.page_size for s, r in zip(self.sink, self.ring))

    @cached_property
    def slack(self):
        """Tokens that may be written before they are read, and taken back after: a page or more."""
        stored = (self.ring[h] - self.hot - self.page_size for h in self.stored_heads)
        return min((*(self.ring[h] - self.window[h] for h in self.local_heads), *stored), default=UNBOUNDED)

    @cached_property
    def global_heads(self):
        """Indices of the heads that keep everything in pages of the model's dtype."""
        return tuple(h for h, r in enumerate(self.ring) if r >= UNBOUNDED)

    @cached_property
    def stored_heads(self):
        """Indices of the heads that keep everything, and most of it in cold pages."""
        return tuple(h for h, bits in enumerate(self.storage) if bits)

    @cached_property
    def stored_groups(self):
        """Stored heads by the bits of their cold pages: pairs of bits and indices."""
        groups = ((bits, tuple(h for h in self.stored_heads if self.storage[h] == bits)) for bits in (8, 4))
        return tuple(group for group in groups if group[1])

    @cached_property
    def local_heads(self):
        """Indices of the heads that keep a sink and a window."""
        return tuple(h for h, w in enumerate(self.window) if w < UNBOUNDED)

    @cached_property
    def local_groups(self):
        """Local heads by equal rule, each as the `HeadRules` of the group and the indices of its heads."""
        groups = {}
        for h in self.local_heads:
            groups.setdefault((self.window[h], self.sink[h], self.ring[h]), []).append(h)
        return tuple((self.take(tuple(heads)), tuple(heads)) for heads in groups.values())

    @cached_property
    def as_seen(self):
        """The same rules with stored heads as global ones: who sees what, and not where it is kept."""
        if not self.stored_heads:
            return self
        sink = tuple(0 if bits else sink for sink, bits in zip(self.sink, self.storage))
        ring = tuple(UNBOUNDED if bits else ring for ring, bits in zip(self.ring, self.storage))
        return HeadRules(self.window, sink, ring, self.page_size, self.reach)

    def most_kept(self, columns):
        """Slots of one sequence's rows, all heads together, where tables have this many columns."""
        return _most_kept(self, columns)

    def take(self, heads):
        """The rules of some of the heads."""
        return self if len(heads) == self.heads else _take(self, heads)

    def tensors(self, device):
        """Window, sink, ring and storage of every head, for kernels: `[4, heads]` of int32."""
        return bounds_tensor((self.window, self.sink, self.ring, self.storage or (0,) * self.heads), device)

    def cold_pages(self, lengths):
        """Cold pages of stored rows that have come to these lengths, and were never longer; numbers or a tensor."""
        behind = (lengths - self.hot) // self.page_size - 1
        return behind.clamp(min=0) if isinstance(lengths, torch.Tensor) else max(behind, 0)

    def slots(self, positions):  # [..., heads or 1, tokens] -> [..., heads, tokens]
        """Where each head keeps the tokens at these positions."""
        if min(self.ring) >= UNBOUNDED:
            return positions
        sink, ring = _column(self.sink, positions.device), _column(self.ring, positions.device)
        return torch.where(positions < sink, positions, sink + (positions - sink) % ring)

    def slot(self, position):
        """Where heads of one rule keep the token at this position, as a plain number."""
        sink, ring = self.sink[0], self.ring[0]
        return position if position < sink else sink + (position - sink) % ring

    def positions(self, slots, lengths):  # [slots], [batch] -> [batch, heads, slots]
        """The position each slot holds in a row of `lengths` tokens; `UNBOUNDED` where it holds none."""
        sink, ring = _column(self.sink, slots.device), _column(self.ring, slots.device)
        last = lengths[:, None, None] - 1 - sink
        in_ring = sink + last - (last - (slots - sink)) % ring
        absent = (in_ring < sink) | (slots >= sink + ring)
        return torch.where(slots < sink, slots, torch.where(absent, UNBOUNDED, in_ring))

    def visible(self, query, key, causal=True):  # [..., heads or 1, tokens], [..., heads or 1, keys]
        """Whether the query at one position sees the key at another, as `[..., heads, tokens, keys]`.

        With `causal=False` only the window speaks, for callers whose own mask says what comes after what.
        """
        window, sink = _column(self.window, key.device)[..., None], _column(self.sink, key.device)[..., None]
        query, key = query[..., :, None], key[..., None, :]
        seen = ((key > query - window) | (key < sink)) & (key > query - self.reach) & (key < UNBOUNDED)
        return seen & (key <= query) if causal else seen


@lru_cache(maxsize=4096)
def _most_kept(rules, columns):
    return sum(min(columns * rules.page_size, sink + ring) for sink, ring in zip(rules.sink, rules.ring))


@lru_cache(maxsize=4096)
def _take(rules, heads):
    storage = rules.storage or (0,) * rules.heads
    window, sink, ring, bits = (tuple(x[h] for h in heads) for x in (rules.window, rules.sink, rules.ring, storage))
    return HeadRules(window, sink, ring, rules.page_size, rules.reach, bits if any(bits) else (), rules.hot)


@lru_cache(maxsize=4096)
def bounds_tensor(values, device):  # [kinds, heads]
    """Numbers of every head as a tensor, for kernels; made once."""
    return torch.tensor(values, dtype=torch.int32, device=device)


@lru_cache(maxsize=4096)
def _column(values, device):
    return torch.tensor(values, device=device)[:, None]  # [heads, 1]
