"""Rows of pages filled step by step, and the oracle that says what every step should give."""

import itertools
from functools import partial
from types import SimpleNamespace

import torch
from redknot_kernels import UNBOUNDED, HeadRules, Pages, append, prefill, read_context, step

GLOBAL = (UNBOUNDED, 0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = SimpleNamespace(append=append, step=step, prefill=prefill)


def oracle(query, key, value, heads, reach, scale, softcap=None, s_aux=None, dtype=torch.float64):
    """Attends the last tokens of `key` under the mask that `heads` (window, sink) spell out."""
    query, key, value = (x.to(dtype) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    q = torch.arange(key.shape[2])[-query.shape[2] :, None]
    k = torch.arange(key.shape[2])[None]
    seen = torch.stack([(k <= q) & ((k > q - w) | (k < s)) & (k > q - reach) for w, s in heads])
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen.repeat_interleave(group, 0), -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


class Rows:
    """The rows of one layer with shuffled pages, filled step by step as a cache does."""

    def __init__(
        self, batch, heads, dims, page_size, total, reach=UNBOUNDED, dtype=torch.float32, seed=0, kernels=PLAIN
    ):
        self.device = "cpu" if kernels is PLAIN else DEVICE
        self.generator = torch.Generator().manual_seed(seed)
        self.rules = HeadRules.make(*zip(*heads), page_size=page_size, reach=reach)
        self.heads, self.reach, self.kernels = heads, reach, kernels
        columns = -(-total // page_size)
        held = [[min(columns, most) for most in self.rules.max_pages] for _ in range(batch)]
        pages = torch.randperm(sum(map(sum, held)), generator=self.generator)
        self.table = torch.zeros(batch, len(heads), columns, dtype=torch.int32)
        start = 0
        for b, h in itertools.product(range(batch), range(len(heads))):
            self.table[b, h, : held[b][h]] = pages[start : start + held[b][h]]
            start += held[b][h]
        self.table = self.table.to(self.device)
        self.pages = Pages(*(torch.zeros(len(pages), page_size, d, dtype=dtype, device=self.device) for d in dims))
        self.keys, self.values = (torch.zeros(batch, len(heads), 0, d, dtype=dtype) for d in dims)

    def step(self, tokens, group, **kwargs):
        """Runs one step of `tokens`; returns the output and what the oracle says, which stays in `self.oracle`."""
        batch, heads, length, dim = self.keys.shape
        random = lambda *shape: torch.randn(*shape, generator=self.generator).to(self.keys.dtype)  # noqa: E731
        query = random(batch, tokens, heads * group, dim).transpose(1, 2)
        k_new, v_new = random(batch, heads, tokens, dim), random(batch, heads, tokens, self.values.shape[-1])
        self.keys, self.values = torch.cat([self.keys, k_new], 2), torch.cat([self.values, v_new], 2)
        self.oracle = partial(oracle, query, self.keys, self.values, self.heads, self.reach, **kwargs)
        query, k_new, v_new = (x.to(self.device) for x in (query, k_new, v_new))
        kwargs = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
        counts = torch.full((batch + 1,), length, dtype=torch.int32, device=self.device)
        if tokens <= self.rules.slack:
            out = self.kernels.step(query, self.pages, k_new, v_new, self.table, counts, None, self.rules, **kwargs)
            assert (counts == length + tokens).all()
        else:
            context = read_context(self.pages, self.table, length, self.rules) if length else None
            self.kernels.append(self.pages, k_new, v_new, self.table, counts[:-1], self.rules)
            out = self.kernels.prefill(query, k_new, v_new, context, self.rules, **kwargs)
        out = None if out is None else out.cpu()
        return out, self.oracle()

    def fill(self, tokens):
        """Writes a prompt and attends nothing."""
        length = self.keys.shape[2]
        new = (
            torch.randn(*x.shape[:2], tokens, x.shape[3], generator=self.generator) for x in (self.keys, self.values)
        )
        k_new, v_new = (x.to(self.keys.dtype) for x in new)
        self.keys, self.values = torch.cat([self.keys, k_new], 2), torch.cat([self.values, v_new], 2)
        lengths = torch.full((len(k_new),), length, dtype=torch.int32, device=self.device)
        self.kernels.append(self.pages, k_new.to(self.device), v_new.to(self.device), self.table, lengths, self.rules)


HEADS = {
    "global": [GLOBAL, GLOBAL],
    "local": [(7, 2), (7, 2)],
    "mixed": [GLOBAL, (7, 2), (1, 0), (33, 5)],
    "wide_sink": [(3, 20), GLOBAL],
}
STEPS = {
    "one_by_one": [1] * 60,
    "prompt": [45, 1, 1, 1],
    "chunks": [5, 40, 1, 17, 24, 1],
    "short": [1, 2, 3],
    "verify": [50, 9, 9, 16, 1],
}
