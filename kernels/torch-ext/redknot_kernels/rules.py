"""What every KV head of a layer sees, and where its row keeps a token.

A *row* is the stored tokens of one KV head of one sequence: a list of pages that is read as one run of slots.

    global row   slot = position, pages are added for ever
    local row    | sink | ring .......................... |
                 0      sink                              sink + ring = pages * page_size

The first `sink` tokens stay where they are; the others go round in the ring. Until the ring wraps, slot = position for
both kinds. The ring is at least one page longer than the window: a step of up to a page may be written before it is
read, and as many tokens may be taken back.
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
    """

    window: tuple
    sink: tuple
    ring: tuple
    page_size: int
    reach: int = UNBOUNDED

    @classmethod
    def make(cls, window, sink, page_size, reach=UNBOUNDED, slack=0):
        """Sizes the rings: whole pages, with room for `max(slack, page_size)` tokens behind the window."""
        ring = []
        for w, s in zip(window, sink):
            pages = -(-(s + w + max(slack, page_size)) // page_size)
            ring.append(UNBOUNDED if w >= UNBOUNDED else pages * page_size - s)
        return cls(tuple(window), tuple(sink), tuple(ring), page_size, reach)

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
        return min((r - w for r, w in zip(self.ring, self.window) if w < UNBOUNDED), default=UNBOUNDED)

    @cached_property
    def global_heads(self):
        """Indices of the heads that keep everything."""
        return tuple(h for h, w in enumerate(self.window) if w >= UNBOUNDED)

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

    def most_kept(self, columns):
        """Slots of one sequence's rows, all heads together, where tables have this many columns."""
        return _most_kept(self, columns)

    def take(self, heads):
        """The rules of some of the heads."""
        return self if len(heads) == self.heads else _take(self, heads)

    def tensors(self, device):
        """Window, sink and ring of every head, for kernels: `[3, heads]` of int32."""
        return bounds_tensor((self.window, self.sink, self.ring), device)

    def slots(self, positions):  # [..., heads or 1, tokens] -> [..., heads, tokens]
        """Where each head keeps the tokens at these positions."""
        if not self.local_heads:
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
    window, sink, ring = (tuple(values[h] for h in heads) for values in (rules.window, rules.sink, rules.ring))
    return HeadRules(window, sink, ring, rules.page_size, rules.reach)


@lru_cache(maxsize=4096)
def bounds_tensor(values, device):  # [kinds, heads]
    """Numbers of every head as a tensor, for kernels; made once."""
    return torch.tensor(values, dtype=torch.int32, device=device)


@lru_cache(maxsize=4096)
def _column(values, device):
    return torch.tensor(values, device=device)[:, None]  # [heads, 1]
