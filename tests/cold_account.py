"""A cache of mixed storages beside a plain account of what it must hold."""

import copy
from collections import Counter

import numpy as np
import torch
from redknot_kernels import dequantise_page, quantise_page
from transformers import LlamaConfig

from redknot_hf import RedKnotCache
from redknot_hf.attention.attention import redknot_attention
from redknot_hf.attention.mask import PaddingMask
from redknot_hf.plan.storage import cold_page_nbytes

PAGE, HOT, DIM, HEADS, LAYERS, GROUP, LONGEST = 16, 20, 16, 4, 1, 2, 150
CONFIG = LlamaConfig(
    hidden_size=HEADS * GROUP * DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS * GROUP,
    num_key_value_heads=HEADS, head_dim=DIM, vocab_size=8, attn_implementation="redknot",
)  # fmt: skip
BITS = {"int8": 8, "int4": 4}


class Account:
    """A cache, and by plain means what its heads see of each sequence.

    Attributes:
        flags: Which slots were real, `[batch, slots]`.
        seen: Of each layer and sequence, keys and values `[heads, tokens, dim]` as a query sees them: what was
            written, and where pages are cold, what they say.
        cold: Cold pages of each layer's stored rows, by sequence.
        behind: By how many tokens each sequence is shorter than it has been.
    """

    def __init__(self, plan, batch, reserved):
        self.plan, self.reserved = plan, reserved
        self.cache = RedKnotCache(CONFIG, plan, page_size=PAGE, hot=HOT, max_cache_len=reserved, impl="torch")
        self.empty(batch)

    def empty(self, batch):
        self.flags = torch.zeros(batch, 0, dtype=torch.bool)
        nothing = torch.zeros(HEADS, 0, DIM)
        self.seen = [[(nothing, nothing)] * batch for _ in range(LAYERS)]
        self.cold = [[0] * batch for _ in range(LAYERS)]
        self.behind = np.zeros(batch, int)

    @property
    def batch(self):
        return len(self.flags)

    @property
    def lengths(self):
        return self.flags.sum(1).numpy()

    def stored(self, layer):
        return [h for h, spec in enumerate(self.plan[layer]) if spec.storage != "model"]

    def like(self, cache):
        """The account of a copy."""
        other = copy.copy(self)
        other.cache, other.behind = cache, self.behind.copy()
        other.seen, other.cold = [[*x] for x in self.seen], [[*x] for x in self.cold]
        return other

    def step(self, tokens, real, random, check):
        self.flags = torch.cat([self.flags, real], 1)
        mask = None if self.flags.all() else PaddingMask.make(self.flags[:, None, None], False, None)
        for i in range(LAYERS):
            draw = lambda heads: torch.randn(self.batch, heads, tokens, DIM, generator=random)  # noqa: E731
            query, key, value = draw(HEADS * GROUP), draw(HEADS), draw(HEADS)
            key = key * torch.linspace(0.2, 2, DIM) + torch.linspace(-1, 1, DIM)  # channels differ
            handles = self.cache.update(key, value, i)
            out, _ = redknot_attention(torch.nn.Module(), query, *handles, mask)
            for b in range(self.batch):
                mine = real[b].nonzero()[:, 0]
                new = [torch.cat([x, y[b, :, mine]], 1) for x, y in zip(self.seen[i][b], (key, value), strict=True)]
                if check and len(mine):
                    wanted = attention(query[b, :, mine].double(), *(x.double() for x in new), self.plan[i])
                    torch.testing.assert_close(out[b, mine].double(), wanted, atol=2e-5, rtol=1e-4)
                self.seen[i][b] = tuple(new)
            self.cool(i)
        self.behind = np.maximum(self.behind - real.sum(1).numpy(), 0)

    def cool(self, layer):
        """Lets pages that have left the hot tail hold what quantising them gives."""
        for b, length in enumerate(self.lengths):
            first, last = self.cold[layer][b], max((length - HOT) // PAGE - 1, self.cold[layer][b])
            if stored := self.stored(layer):
                self.cold[layer][b] = last
                self.freeze(layer, b, stored, first, last)

    def freeze(self, layer, sequence, heads, first, last):
        """Takes what some cold pages say, which must be what quantising gives but for a rounding here and there."""
        if first >= last:
            return
        span = np.arange((first + 1) * PAGE, (last + 1) * PAGE)
        keys, values = (x.clone() for x in self.seen[layer][sequence])
        storage = self.cache.layers[layer].storage
        for h in heads:
            bits = BITS[self.plan[layer][h].storage]
            pages = [x[h, span].unflatten(0, (-1, PAGE)) for x in (keys, values)]
            wanted = dequantise_page(*quantise_page(*pages, bits), bits, PAGE, (DIM, DIM))
            for x, found, y in zip((keys, values), storage.read(sequence, span * 0 + h, span), wanted, strict=True):
                assert (found - y.flatten(0, 1)).norm() <= 0.02 * y.norm()
                x[h, span] = found
        self.seen[layer][sequence] = keys, values

    def cut(self, slots):
        """Takes slots back, if the cache does; what lies within a page of the longest it must."""
        gone = self.flags[:, self.flags.shape[1] - slots :].sum(1).numpy()
        try:
            self.cache.crop(-slots)
        except ValueError:
            assert (self.behind + gone).max() > PAGE, "a crop within a page was refused"
            return
        self.flags = self.flags[:, : self.flags.shape[1] - slots]
        self.behind = self.behind + gone
        for i in range(LAYERS):
            for b, length in enumerate(self.lengths):
                self.seen[i][b] = tuple(x[:, :length] for x in self.seen[i][b])
                self.cold[i][b] = 0 if length <= PAGE else self.cold[i][b]

    def select(self, index):
        self.flags, self.behind = self.flags[index], self.behind[index]
        self.seen = [[x[i] for i in index] for x in self.seen]
        self.cold = [[x[i] for i in index] for x in self.cold]

    def compress(self, plan):
        old, self.plan = self.plan, plan
        self.cache.compress(plan)
        for i in range(LAYERS):
            if self.reserved is not None and self.cache.layers[i].is_initialized:
                storage, (hot, cold) = self.cache.layers[i].storage, self.pages(i)
                assert storage.pool.size == hot.sum()  # no page is left that no row needs
                assert sum(part.pool.size for part in storage.cold.parts.values()) == cold.sum()
            had = any(spec.storage != "model" for spec in old[i])
            new = [h for h in self.stored(i) if old[i][h].storage != plan[i][h].storage]
            for b, length in enumerate(self.lengths):
                if new:
                    self.cold[i][b] = self.cold[i][b] if had else max((length - HOT) // PAGE - 1, 0)
                    self.freeze(i, b, new, 0, self.cold[i][b])
            if not self.stored(i):
                self.cold[i] = [0] * self.batch

    def check_content(self):
        """Every row holds what its next query sees, and what it holds is what it should be."""
        for i, layer in enumerate(self.cache.layers):
            for b, length in enumerate(self.lengths):
                for h, spec in enumerate(self.plan[i]):
                    at = layer.storage.rows.positions_held(b, h)
                    k = np.arange(length)
                    needed = k if spec.is_global else k[(k < spec.sink) | (k > length - spec.window)]
                    assert np.isin(needed, at).all()
                    for x, y in zip(layer.storage.read(b, at * 0 + h, at), self.seen[i][b], strict=True):
                        torch.testing.assert_close(x, y[h, at], atol=1e-6, rtol=1e-6)

    def pages(self, layer):
        """Pages of every row, `[batch, heads]`, and of its cold ones, by nothing but the lengths and the plan."""
        hot, cold = np.zeros((2, self.batch, HEADS), int)
        for (b, h), _ in np.ndenumerate(hot):
            spec = self.plan[layer][h]
            length = self.lengths[b] if self.reserved is None else self.reserved
            hot[b, h] = -(-length // PAGE)
            if spec.storage != "model":
                hot[b, h] = min(hot[b, h], -(-(PAGE + HOT + PAGE + PAGE) // PAGE))
                cold[b, h] = self.cold[layer][b]
                if self.reserved is not None:
                    cold[b, h] = max((self.reserved - HOT) // PAGE - 1, 0)
            elif not spec.is_global:
                hot[b, h] = min(hot[b, h], -(-(spec.sink + spec.window + PAGE) // PAGE))
        return hot, cold


def attention(query, keys, values, specs):
    """Dense attention in float64; queries `[query heads, tokens, dim]` are the last tokens."""
    total, tokens = keys.shape[1], query.shape[1]
    q, k = torch.arange(total - tokens, total)[:, None], torch.arange(total)
    outs = []
    for h, spec in enumerate(specs):
        seen = k <= q if spec.is_global else (k <= q) & ((k > q - spec.window) | (k < spec.sink))
        scores = query[h * GROUP : (h + 1) * GROUP] @ keys[h].T * DIM**-0.5
        outs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values[h])
    return torch.cat(outs).transpose(0, 1)


def check_pages(accounts):
    """Tables list as many pages as they should, are counted where they list, and bytes are those of the pages."""
    for i in range(LAYERS):
        listed, pools = {}, {}
        for account in accounts:
            layer = account.cache.layers[i]
            if not layer.is_initialized:
                continue
            storage = layer.storage
            told = storage.nbytes_by_storage  # which takes back what dead forks held
            hot, cold = account.pages(i)
            assert np.array_equal((storage.rows.table >= 0).sum(2), hot)
            tables = [(storage.pool, storage.rows, "model")]
            tables += [(pool, rows, f"int{bits}") for bits, (rows, pool) in storage.cold.parts.items()]
            for pool, rows, name in tables:
                if name != "model":
                    mine = np.array([spec.storage == name for spec in account.plan[i]])
                    assert np.array_equal((rows.table >= 0).sum(2), cold * mine)
                listed.setdefault(id(pool), Counter()).update(rows.table[rows.table >= 0].tolist())
                pools[id(pool)] = pool
                each = 2 * PAGE * DIM * 4 if name == "model" else cold_page_nbytes(name, PAGE, DIM, DIM)
                assert told[name] == pool.nbytes == pool.size * each
            assert set(told) == {"model", *(spec.storage for spec in account.plan[i])}
        for key, pool in pools.items():
            counts = np.zeros(pool.size, int)
            counts[list(listed[key])] = list(listed[key].values())
            assert np.array_equal(pool.references.counts, counts)
            assert pool.free == (counts == 0).sum()
