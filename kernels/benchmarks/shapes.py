"""A layer of Llama-3.1-8B's shape, and steps of decoding on rows of it."""

from collections.abc import Callable

import torch
from redknot_kernels import Cold, HeadRules, Pages

HEADS, GROUP, DIM = 8, 4, 128
PAGE = 64
LOCAL = (256, 4)


def step_on_rows(
    kernels, rules: HeadRules, batch: int, length: int, dtype: torch.dtype, device: torch.device, tokens: int = 1,
    cold: Cold | None = None,
) -> Callable:  # fmt: skip
    """A step on rows of its own, with shuffled pages; it can be called any number of times."""
    held = [min(-(-length // PAGE), most) for most in rules.max_pages]
    make = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)  # noqa: E731

    ids = torch.randperm(batch * sum(held), device=device).int()
    table = torch.zeros(batch, HEADS, max(held), dtype=torch.int32, device=device)
    for b, part in enumerate(ids.split(sum(held))):
        for h, pages in enumerate(part.split(held)):
            table[b, h, : len(pages)] = pages
    pages = Pages(make(len(ids), PAGE, DIM), make(len(ids), PAGE, DIM))
    query, *new = (make(batch, heads, tokens, DIM) for heads in (HEADS * GROUP, HEADS, HEADS))
    counts = torch.full((batch + 1,), length - tokens, dtype=torch.int32, device=device)

    def run():
        counts.fill_(length - tokens)  # every call takes the last places
        kernels.step(query, pages, *new, table, counts, None, rules, scale=DIM**-0.5, cold=cold)

    return run
