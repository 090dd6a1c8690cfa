"""Computing the segments of texts: a prefill of which every head's part is read out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from redknot_kernels import UNBOUNDED
from torch import Tensor

from redknot_hf.attention.devices import input_device
from redknot_hf.cache.argument import cache_argument
from redknot_hf.cache.cache import RedKnotCache, row_layers
from redknot_hf.cache.layer import RECORDED, lengths_of
from redknot_hf.cache.span import KeptLayer
from redknot_hf.plan.plan import HeadPlan

from .segment import Segment, SegmentRef, empty

Keep = Literal["plan", "full"]
# Tokens, padding included, that are prefilled in one batch.
_BATCH_TOKENS = 8192
# Tokens of one forward pass.
CHUNK = 2048


@torch.no_grad()
def record(
    model: Any,
    plan: HeadPlan,
    texts: Sequence[Sequence[int]],
    prefix: Sequence[int] = (),
    *,
    keep: Keep = "plan",
    addresses: Sequence[str],
    page_size: int = 64,
    impl: str | None = None,
) -> list[Segment]:
    """Prefills texts in one batch, each behind the same prefix, and keeps what later use can need.

    Args:
        model: Runs with `attn_implementation="redknot"`.
        plan: What heads see and keep.
        texts: Token ids, at least one a text; lengths may differ.
        prefix: Tokens that all of them stand behind; they are run once, and not kept.
        keep: `"plan"` keeps of a local head its first `sink` tokens and its last `window`; `"full"` keeps all tokens
            of all heads, computed under the plan.
        addresses: Name of each segment.
        page_size, impl: Of the cache that the texts go through.
    """
    cache = RedKnotCache(model.config, plan, page_size=page_size, impl=impl)
    forward(model, cache, [list(prefix)])
    if keep == "full":
        cache.activate_past_recording()  # so that a chunk can be read before rings lose it
    if len(prefix):
        cache.batch_repeat_interleave(len(texts))
    segments: list[Segment] = []
    done = 0
    for size in _chunks(plan, max(map(len, texts)), page_size, bool(len(prefix)), keep):
        forward(model, cache, [list(text[done : done + size]) for text in texts])
        segments = segments or _empty(cache, texts, prefix, keep, addresses, input_device(model))
        for b, segment in enumerate(segments):
            if done < segment.tokens:
                _collect(cache, b, segment, done, min(done + size, segment.tokens))
        done += size
    return segments


def forward(model: Any, cache: RedKnotCache, texts: Sequence[Sequence[int]]) -> None:
    """Runs the next tokens of every sequence; where texts differ in length, the shorter ones are padded behind.

    Padding counts as slots: `Storage.left_align` makes them plain again.
    """
    for start in range(0, max(map(len, texts)), CHUNK):
        ids, real = _padded([text[start : start + CHUNK] for text in texts])
        slots, lengths = cache.get_seq_length(), _lengths(cache, len(texts))
        places = (lengths[:, None] + real.cumsum(1) - 1).clamp(min=0)
        flags = torch.cat([torch.arange(slots) >= slots - lengths[:, None], real], 1)
        mask = None if flags.all() else flags.to(input_device(model))
        model(
            input_ids=ids.to(input_device(model)), attention_mask=mask, position_ids=places.to(input_device(model)),
            logits_to_keep=1, **cache_argument(model, cache),
        )  # fmt: skip


def _padded(texts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Ids, and which of them are no padding behind a text."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], dtype=torch.long)
    return ids, torch.arange(longest) < torch.tensor([len(text) for text in texts])[:, None]


def _lengths(cache: RedKnotCache, batch: int) -> Int[Tensor, " batch"]:
    return torch.from_numpy(lengths_of(cache, batch))


def _chunks(plan: HeadPlan, longest: int, page_size: int, behind: bool, keep: Keep) -> Iterator[int]:
    """Sizes of the steps in which texts are read, so that each can be read out before rings lose it."""
    sinks = max(spec.sink for layer in plan for spec in layer) if behind else 0
    done = 0
    while done < longest:
        size = RECORDED if keep == "full" else page_size if done < sinks else CHUNK
        yield size
        done += size


def _empty(
    cache: RedKnotCache,
    texts: Sequence[Sequence[int]],
    prefix: Sequence[int],
    keep: Keep,
    addresses: Sequence[str],
    device: torch.device,
) -> list[Segment]:
    """Segments without data yet, on the device where the store keeps them: layers may be on several."""
    found: dict[int, KeptLayer] = {}
    for i, layer in row_layers(cache):
        rules, pages = layer.storage.rows.rules, layer.storage.pool.pages
        window, sink = rules.window, rules.sink
        if keep == "full":
            window, sink = (UNBOUNDED,) * len(window), (0,) * len(sink)
        found[i] = KeptLayer(window, sink, pages.keys.shape[-1], pages.values.shape[-1])
    layers = tuple(found.get(i) for i in range(len(cache.layers)))
    like = next(layer for _, layer in row_layers(cache)).storage.pool.pages.keys.new_empty(0, device=device)
    return [
        empty(address, tuple(text), tuple(prefix), layers, like)
        for address, text in zip(addresses, texts, strict=True)
    ]


def _collect(cache: RedKnotCache, sequence: int, segment: Segment, done: int, end: int) -> None:
    """Reads what a step from token `done` to `end` has brought out of the rows, into the segment."""
    for i, layer in row_layers(cache):
        kept = segment.layers[i]
        assert kept is not None
        heads, tokens = kept.packed(segment.tokens)
        new = np.flatnonzero((tokens >= done) & (tokens < end))
        read_out = layer.storage.read(sequence, heads[new], len(segment.prefix) + tokens[new])
        place = torch.from_numpy(new).to(segment.data.device)
        for target, source in zip((segment.keys(i), segment.values(i)), read_out, strict=True):
            target.index_copy_(0, place, source.to(target.device))


def batches(refs: Sequence[SegmentRef]) -> Iterator[list[SegmentRef]]:
    """Texts by prefix, in order of length, so many together that a batch has at most so many tokens with padding."""
    batch: list[SegmentRef] = []
    for ref in refs:
        if batch and (ref.prefix != batch[0].prefix or (len(batch) + 1) * len(ref) > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(ref)
    if batch:
        yield batch
