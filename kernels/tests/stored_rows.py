"""Rows with hot and cold pages, filled step by step, and what they hold in float64."""

from functools import partial

import torch
from paged_rows import DEVICE, oracle
from redknot_kernels import (
    UNBOUNDED,
    Cold,
    HeadRules,
    Pages,
    cold_pool,
    dequantise_page,
    implementation,
    read_context,
)

INT8, INT4, GLOBAL = (UNBOUNDED, 0, 8), (UNBOUNDED, 0, 4), (UNBOUNDED, 0, 0)
PLANS = {
    "int8": [INT8, INT8],
    "int4": [INT4, INT4],
    "mixed": [INT8, INT4, (9, 2, 0), GLOBAL, INT8],
}


class StoredRows:
    """The rows of one layer; pages lie shuffled, and in Triton's nothing is finite that was not written."""

    def __init__(self, name, heads, dims, page_size, total, batch=2, hot=20, dtype=torch.float32, seed=0):
        self.kernels, self.device = implementation(name), DEVICE if name == "triton" else "cpu"
        self.generator = torch.Generator().manual_seed(seed)
        windows, sinks, bits = zip(*heads, strict=True)
        self.rules = HeadRules.make(windows, sinks, page_size, storage=bits, hot=hot)
        self.heads, self.batch, self.dims = heads, batch, dims
        empty = torch.nan if name == "triton" else 0.0
        held = [min(-(-total // page_size), most) for most in self.rules.max_pages]
        order = torch.randperm(batch * sum(held), generator=self.generator).int()
        self.table = torch.zeros(batch, len(heads), max(held), dtype=torch.int32)
        for b, part in enumerate(order.split(sum(held))):
            for h, pages in enumerate(part.split(held)):
                self.table[b, h, : len(pages)] = pages
        self.pages = Pages(*(torch.full((len(order), page_size, d), empty, dtype=dtype) for d in dims))
        columns, pools = -(-total // page_size), {8: None, 4: None}
        cold_table = torch.zeros(batch, len(heads), columns, dtype=torch.int32)
        for kind, group in self.rules.stored_groups:
            pages = torch.randperm(batch * len(group) * columns, generator=self.generator)
            cold_table[:, list(group)] = pages.int().view(batch, len(group), columns)
            pools[kind] = cold_pool(len(pages), kind, page_size, dims, self.device)
            pools[kind].scales.fill_(empty)
        counts = torch.zeros(batch, len(heads), dtype=torch.int32)
        self.table, self.pages = self.table.to(self.device), Pages(*(x.to(self.device) for x in self.pages))
        self.cold = Cold(pools[8], pools[4], cold_table.to(self.device), counts.to(self.device))
        self.counts = torch.zeros(batch + 1, dtype=torch.int32, device=self.device)
        self.keys, self.values = (torch.zeros(batch, len(heads), 0, d, dtype=dtype) for d in dims)

    def step(self, tokens, group, **options):
        """Runs a step; returns what came out, and a function that says what should, in a dtype of choice."""
        heads, length = len(self.heads), self.keys.shape[2]
        made = lambda count, dim: torch.randn(self.batch, tokens, count, dim, generator=self.generator)  # noqa: E731
        query, k_new, v_new = made(heads * group, self.dims[0]), made(heads, self.dims[0]), made(heads, self.dims[1])
        k_new = k_new * torch.linspace(0.2, 3, self.dims[0]) + torch.linspace(-4, 4, self.dims[0])  # channels differ
        query, k_new, v_new = (x.to(self.keys.dtype).transpose(1, 2) for x in (query, k_new, v_new))
        held = self.held()
        new = torch.cat([held[0], k_new.double()], 2), torch.cat([held[1], v_new.double()], 2)
        self.keys, self.values = torch.cat([self.keys, k_new], 2), torch.cat([self.values, v_new], 2)
        plan = [(window, sink) for window, sink, _ in self.heads]
        wanted = partial(oracle, query, *new, plan, UNBOUNDED, dtype=torch.float64, **options)
        moved = {name: x.to(self.device) if torch.is_tensor(x) else x for name, x in options.items()}
        query, k_new, v_new = (x.to(self.device) for x in (query, k_new, v_new))
        rows = self.table, self.counts
        if tokens <= min(self.rules.slack, self.rules.page_size):
            out = self.kernels.step(query, self.pages, k_new, v_new, *rows, None, self.rules, cold=self.cold, **moved)
        else:
            past = None
            if length:
                past = read_context(self.pages, self.table, length, self.rules, self.cold, self.kernels.lay_out)
            self.kernels.append(self.pages, k_new, v_new, self.table, self.counts[:-1], self.rules, self.cold)
            out = self.kernels.prefill(query, k_new, v_new, past, self.rules, **moved)
            self.counts += tokens
        return out.cpu(), wanted

    def held(self):
        """Keys and values as the rows hold them, `[batch, heads, tokens, dim]` in float64."""
        keys, values = self.keys.double().clone(), self.values.double().clone()
        size = self.rules.page_size
        for b in range(self.batch):
            for h, (_, _, bits) in enumerate(self.heads):
                for i in range(int(self.cold.counts[b, h])):
                    pool, page = self.cold.pool(bits), int(self.cold.table[b, h, i])
                    found = dequantise_page(pool.codes[page], pool.scales[page], bits, size, self.dims)
                    span = slice((i + 1) * size, (i + 2) * size)
                    keys[b, h, span], values[b, h, span] = (x.double().cpu() for x in found)
        return keys, values
