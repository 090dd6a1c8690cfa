"""A storage of stored heads, driven by hand, beside all that it was ever given."""

import numpy as np
import torch
from redknot_kernels import UNBOUNDED, HeadRules, dequantise_page, implementation
from redknot_kernels.plain.quantise import quantise_page

from redknot_hf.cache.step import Step
from redknot_hf.cache.storage import Storage

PAGE, HOT, DIMS, GROUP = 16, 20, (16, 8), 2
# Of each head the window, the sinks and the bits.
HEADS = [(UNBOUNDED, 0, 8), (UNBOUNDED, 0, 4), (9, 2, 0), (UNBOUNDED, 0, 0), (UNBOUNDED, 0, 8)]
OPTIONS = {"scale": 0.25, "softcap": None, "s_aux": None}


def rules_of(heads, slack=0, hot=HOT):
    windows, sinks, bits = zip(*heads, strict=True)
    return HeadRules.make(windows, sinks, PAGE, slack=slack, storage=bits, hot=hot)


class Held:
    """The storage, what its heads are to keep, and each sequence's true keys and values, `[heads, tokens, dim]`."""

    def __init__(self, impl="torch", batch=2, reserved=None, heads=HEADS, seed=0):
        kernels, self.heads = implementation(impl), list(heads)
        self.generator = torch.Generator().manual_seed(seed)
        device = torch.device("cpu")
        self.storage = Storage(batch, rules_of(heads), DIMS, torch.float32, device, kernels, reserved)
        self.keys = [torch.zeros(len(heads), 0, DIMS[0]) for _ in range(batch)]
        self.values = [torch.zeros(len(heads), 0, DIMS[1]) for _ in range(batch)]

    def fork(self):
        other = object.__new__(Held)
        vars(other).update(vars(self), storage=self.storage.fork(), keys=[*self.keys], values=[*self.values])
        return other

    def copy_of(self, storage):
        other = self.fork()
        other.storage = storage
        return other

    def step(self, tokens, real=None, check=True):
        """Attends new tokens, and holds what comes out against attention over what the rows hold."""
        batch, heads = len(self.keys), len(self.heads)
        made = lambda count, dim: torch.randn(batch, count, tokens, dim, generator=self.generator)  # noqa: E731
        query, key, value = made(heads * GROUP, DIMS[0]), made(heads, DIMS[0]), made(heads, DIMS[1])
        key = key * torch.linspace(0.2, 2, DIMS[0]) + torch.linspace(-1, 1, DIMS[0])  # channels differ
        flags = torch.ones(batch, tokens, dtype=torch.bool) if real is None else real
        held = [self.held(b) for b in range(batch)] if check else []
        step = Step(self.storage, key, value, tokens, self.storage.history.slots)
        out = self.storage.attend(step, query, real, OPTIONS)
        for b in range(batch):
            mine = flags[b].nonzero()[:, 0]
            self.keys[b] = torch.cat([self.keys[b], key[b, :, mine]], 1)
            self.values[b] = torch.cat([self.values[b], value[b, :, mine]], 1)
            if check and len(mine):
                pairs = zip(held[b], (key, value), strict=True)
                new = [torch.cat([past, x[b, :, mine].double()], 1) for past, x in pairs]
                wanted = self.attention(query[b, :, mine].double(), *new)
                torch.testing.assert_close(out[b, mine].double(), wanted, atol=2e-5, rtol=1e-4)

    def attention(self, query, keys, values):
        """Dense attention in float64 under the explicit mask; queries are the last tokens."""
        total, tokens = keys.shape[1], query.shape[1]
        q, k = torch.arange(total - tokens, total)[:, None], torch.arange(total)
        outs = []
        for h, (window, sink, _) in enumerate(self.heads):
            seen = (k <= q) & ((k > q - window) | (k < sink))
            scores = query[h * GROUP : (h + 1) * GROUP] @ keys[h].T * OPTIONS["scale"]
            outs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values[h])
        return torch.cat(outs).transpose(0, 1)

    def held(self, sequence):
        """What the rows hold of a sequence, in float64: the truth, and in place of cold pages what these say."""
        keys, values = (x[sequence].double().clone() for x in (self.keys, self.values))
        cold = self.storage.cold
        for h, (_, _, bits) in enumerate(self.heads):
            for i in range(int(cold.counts[sequence]) if bits else 0):
                rows, pool = cold.parts[bits]
                page = int(rows.table[sequence, h, i])
                assert page >= 0
                found = dequantise_page(pool.pages.codes[page], pool.pages.scales[page], bits, PAGE, DIMS)
                span = slice((i + 1) * PAGE, (i + 2) * PAGE)
                keys[h, span], values[h, span] = (x.double() for x in found)
        return keys, values

    def cut(self, slots, tokens=None):
        """Takes slots back; `tokens` are those of each sequence, where some were padding."""
        self.storage.cut(slots)
        for b, count in enumerate(tokens or [slots] * len(self.keys)):
            end = self.keys[b].shape[1] - count
            self.keys[b], self.values[b] = self.keys[b][:, :end], self.values[b][:, :end]

    def select(self, index, shrink=False):
        self.storage.select(torch.tensor(index), shrink)
        self.keys, self.values = ([x[i] for i in index] for x in (self.keys, self.values))

    def check(self):
        """Pages are counted, hot and cold ones hold what they should, and bytes are those of the formula."""
        storage, cold = self.storage, self.storage.cold
        storage.catch_up()
        for pool in (storage.pool, *(part.pool for part in cold.parts.values())):
            pool.collect()
            assert (pool.references.counts == pool.refs()).all()
        for b in range(len(self.keys)):
            length = self.keys[b].shape[1]
            assert storage.rows.lengths[b] == length
            assert not cold.parts or cold.counts[b] >= storage.rows.rules.cold_pages(length)
            for h in range(len(self.heads)):
                where = storage.rows.positions_held(b, h)
                got = storage.read(b, np.full(len(where), h), where)
                for x, y in zip(got, self.held(b), strict=True):
                    torch.testing.assert_close(x.double(), y[h, where], atol=1e-6, rtol=1e-6)
                self.check_codes(b, h)

    def check_codes(self, sequence, head):
        """Cold pages are what the truth is in so many bits, as near as two ways to sum."""
        bits = self.heads[head][2]
        rounding = {8: 0.02, 4: 0.3}
        count = int(self.storage.cold.counts[sequence]) if bits else 0
        if count:
            span = slice(PAGE, (count + 1) * PAGE)
            for x, y in zip(self.held(sequence), (self.keys[sequence], self.values[sequence]), strict=True):
                error = (x[head, span] - y[head, span]).norm() / y[head, span].norm()
                assert 0 < error < rounding[bits]

    def formula(self):
        """Bytes by storage that the rows need, and the most that they may take beside them."""
        rules, lengths = self.storage.rows.rules, self.storage.rows.lengths
        page = PAGE * sum(DIMS) * 4
        hot = int(self.storage.rows.pages_needed(lengths).sum())
        found = {"model": (hot * page, (hot + 2 * len(lengths) * rules.heads) * page)}
        for bits, heads in rules.stored_groups:
            one = sum(x.nbytes for x in quantise_page(torch.zeros(PAGE, DIMS[0]), torch.zeros(PAGE, DIMS[1]), bits))
            pages = int(self.storage.cold.counts.sum()) * len(heads)
            found[f"int{bits}"] = pages * one, (pages + 2 * len(lengths) * len(heads)) * one
        return found

    def check_bytes(self):
        found = self.storage.nbytes_by_storage
        wanted = self.formula()
        assert found.keys() == wanted.keys()
        for name, nbytes in found.items():
            assert wanted[name][0] <= nbytes <= wanted[name][1], name
