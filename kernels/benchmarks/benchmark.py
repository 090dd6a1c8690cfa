"""Workloads for `kernels benchmark ./kernels`: each is checked against plain PyTorch, whose time is the reference.

Shapes are those of Llama-3.1-8B, 32 query and 8 KV heads of 128; on a CPU they are small and say nothing about speed.
`attention.py` measures more, and more carefully.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark

HEADS, GROUP, DIM, PAGE = 8, 4, 128, 64
WINDOW, SINK = 256, 4


class _Rows:
    """What the workloads share: rows of one plan, dense keys and values, and the mask that the plan means."""

    seed = 0

    def _make(self, global_heads: int, length: int, tokens: int) -> None:
        on_gpu = self.device != "cpu"
        self.length = length if on_gpu else min(length, 700)
        self.tokens = min(tokens, self.length)
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.kernels = self.kernel.implementation(None, torch.device(self.device))
        unbounded, local = self.kernel.UNBOUNDED, HEADS - global_heads
        self.rules = self.kernel.HeadRules.make(
            (unbounded,) * global_heads + (WINDOW,) * local, (0,) * global_heads + (SINK,) * local, page_size=PAGE
        )
        self.query = 3 * self._random(HEADS * GROUP, self.tokens)  # a few keys matter to each
        # Outputs are compared by an absolute bound: in bfloat16 they are small, so that a rounding stays below it.
        self.small = 8 if on_gpu else 1
        self.keys, self.values = self._random(HEADS, self.length), self._random(HEADS, self.length) / self.small
        last = torch.arange(self.length, device=self.device)
        seen = self.rules.visible(last[-self.tokens :], last[None])
        self.mask = seen.repeat_interleave(GROUP, 0)[None]

    def _random(self, heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, DIM, device=self.device, dtype=self.dtype).transpose(1, 2)

    def _dense(self) -> torch.Tensor:
        mask = None if self.mask.all() else self.mask
        return F.scaled_dot_product_attention(
            self.query, self.keys, self.values, attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)


class DecodeBenchmark(_Rows, Benchmark):
    """One token at the end of a long row: appended, attended and counted."""

    def _fill(self, global_heads: int) -> None:
        self._make(global_heads, 32768, 1)
        held = [min(-(-self.length // PAGE), most) for most in self.rules.max_pages]
        order = torch.randperm(sum(held), device=self.device).int()
        self.table = torch.zeros(1, HEADS, max(held), dtype=torch.int32, device=self.device)
        for head, pages in enumerate(order.split(held)):
            self.table[0, head, : len(pages)] = pages
        self.pages = self.kernel.Pages(*torch.zeros(2, len(order), PAGE, DIM, device=self.device, dtype=self.dtype))
        self.counts = torch.zeros(2, dtype=torch.int32, device=self.device)
        past = [x[:, :, :-1] for x in (self.keys, self.values)]
        self.kernels.append(self.pages, *past, self.table, self.counts[:1], self.rules)

    def _step(self) -> None:
        self.counts.fill_(self.length - 1)
        new = self.keys[:, :, -1:], self.values[:, :, -1:]
        self.out = self.kernels.step(
            self.query, self.pages, *new, self.table, self.counts, None, self.rules, scale=DIM**-0.5
        )

    def setup_all_global(self) -> None:
        self._fill(HEADS)

    def benchmark_all_global(self) -> None:
        self._step()

    def verify_all_global(self) -> torch.Tensor:
        return self._dense()

    def setup_one_global(self) -> None:
        self._fill(1)

    def benchmark_one_global(self) -> None:
        self._step()

    def verify_one_global(self) -> torch.Tensor:
        return self._dense()


class PrefillBenchmark(_Rows, Benchmark):
    """A prompt, with heads of which one sees everything and the others a sink and a window."""

    def setup_one_global(self) -> None:
        self._make(1, 8192, 8192)

    def benchmark_one_global(self) -> None:
        self.out = self.kernels.prefill(self.query, self.keys, self.values, None, self.rules, scale=DIM**-0.5)

    def verify_one_global(self) -> torch.Tensor:
        return self._dense()


class PlaceBenchmark(_Rows, Benchmark):
    """A stored document of 4K tokens goes to its rows, and its keys to other positions."""

    def setup_document(self) -> None:
        self._make(HEADS, 4096, 1)
        stored = [x[0].flatten(0, 1).contiguous() for x in (self.keys / self.small, self.values)]
        angles = torch.rand(self.length, DIM // 2, device=self.device) * 1000
        columns = -(-self.length // PAGE)
        table = torch.randperm(HEADS * columns, device=self.device).int().view(HEADS, columns)
        kept = (self.kernel.UNBOUNDED,) * HEADS, (0,) * HEADS
        rotation = self.kernel.Rotation(angles.cos(), angles.sin())
        self.document = *stored, table, self.rules, kept, (self.length, 0, 0), rotation
        self.pages = torch.zeros(2, HEADS * columns, PAGE, DIM, device=self.device, dtype=self.dtype)
        self.out = self.pages[0]

    def benchmark_document(self) -> None:
        self.kernels.place(self.kernel.Pages(*self.pages), *self.document)

    def verify_document(self) -> torch.Tensor:
        plain = torch.zeros_like(self.pages)
        self.kernel.place(self.kernel.Pages(*plain), *self.document)
        return plain[0]
