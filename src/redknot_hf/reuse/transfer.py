"""Caches that travel: to another process over torch.distributed, or through a segment store.

What is sent are spans: of every head the tokens that its rule keeps, packed, and not a byte of slack. On the wire a
message is a header (JSON: of each sequence its tokens, what is kept of each layer, the dtype), behind the sizes of
both, and then the data of all sequences. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

from redknot_hf.cache.cache import RedKnotCache
from redknot_hf.cache.span import KeptLayer, Span, places

from .ids import Texts, one_for_each
from .segment import Segment, SegmentRef
from .store import SegmentStore

_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
# Bytes of a header at most; one is some hundred bytes a layer.
_LONGEST = 1 << 26


def send(cache: RedKnotCache, dst: int, *, group: Any = None) -> int:
    """Sends what a cache holds to another process, which `receive`s it; the cache stays as it is.

    Args:
        cache: Of any batch; it holds something.
        dst: Rank of the process.
        group: Process group (gloo, nccl); the default one if `None`.

    Returns:
        Bytes on the wire.

    Raises:
        ValueError: The cache holds nothing, or a layer keeps more than keys and values.
    """
    spans, device = cache.spans(slack=False), _device(group)
    said = [
        {
            "tokens": span.tokens,
            "layers": [None if kept is None else astuple(kept) for kept in span.layers],
            "dtype": str(span.data.dtype),
        }
        for span in spans
    ]
    header = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
    data = [span.data.contiguous().view(torch.uint8) for span in spans]
    sizes = torch.tensor([len(header), sum(map(len, data))])
    for part in (sizes, header, *data):
        dist.send(part.to(device), dst, group)
    return sum(part.nbytes for part in (sizes, header, *data))


def receive(cache: RedKnotCache, src: int, *, group: Any = None) -> int:
    """Fills an empty cache with what another process sends; it goes on where that one's was.

    Args:
        cache: Of the same model, and of the same plan or one that keeps no more; mutated.
        src: Rank of the process.
        group: As for `send`.

    Returns:
        Bytes on the wire.

    Raises:
        ValueError: The cache is not empty, or what comes is no message, another model's, or lacks what the plan needs.
            The whole message has been taken off the wire then, unless it makes no sense.
    """
    device = _device(group)
    sizes = torch.zeros(2, dtype=torch.int64, device=device)
    dist.recv(sizes, src, group)
    length, total = sizes.tolist()
    if not 0 < length <= _LONGEST:
        raise ValueError(f"rank {src} sends a header of {length} bytes: send caches by redknot_hf.reuse.transfer.send")
    header = _received(length, src, group, device)
    outlines = _outlines(header.cpu().numpy().tobytes(), total, src)
    spans = []
    for tokens, layers, dtype in outlines:
        elements = places(layers, tokens)[1]
        data = _received(elements * dtype.itemsize, src, group, device)
        spans.append(Span(tokens, layers, data.view(dtype)))
    cache.extend(spans)
    return sizes.nbytes + length + total


def park(cache: RedKnotCache, texts: Texts, store: SegmentStore) -> list[SegmentRef]:
    """Puts what a cache holds into a store, one segment a sequence, for this or another process to `resume`.

    Args:
        cache: Of the store's model and plan; it stays as it is.
        texts: Ids of all that each sequence has read: the prompt, and of the answer what went through the model, which
            the last token that was sampled did not.
        store: Keeps it under the address of these ids; those who share its tiers find it by `store.ref(ids)`.

    Raises:
        ValueError: There is not a text for each sequence, it is not what the cache holds, or that was read under
            another plan than the store's.
    """
    if cache.plan.stored("model") != store.plan.stored("model"):
        raise ValueError("the cache has another plan than the store, whose segments are named by it: give both one")
    spans = cache.spans(slack=False)
    return [store.keep_read(ids, span) for ids, span in zip(one_for_each(texts, spans, "texts"), spans, strict=True)]


def resume(refs: SegmentRef | Sequence[SegmentRef], store: SegmentStore, **options: Any) -> RedKnotCache:
    """A cache that has read what segments hold, each from the first token on: the next tokens go on from there.

    A segment that the store has lost is read anew.

    Args:
        refs: One a sequence: what `park`, `store.add` or `store.ref` gave for texts without a prefix.
        store: Where they are.
        options: Of the cache (`page_size`, `max_cache_len`, `impl`).

    Raises:
        ValueError: A text was read behind a prefix, which is not in its segment.
    """
    cache = RedKnotCache(store.model.config, store.plan, **options)
    batch = [refs] if isinstance(refs, SegmentRef) else list(refs)
    cache.extend([as_span(held.here()) for held in store.fetch(batch)])
    return cache


def as_span(segment: Segment) -> Span:
    """A segment as what a cache holds, to be its beginning; shares the segment's data.

    Raises:
        ValueError: It was read behind a prefix.
    """
    if segment.prefix:
        raise ValueError(
            f"the text was read behind {len(segment.prefix)} tokens that are not stored with it, so no cache begins "
            "with it: store it with them, store.add([*prefix, *ids]), or assemble both"
        )
    data = segment.data
    if segment.coarse is not None:
        pairs = [segment.pair(i) for i, kept in enumerate(segment.layers) if kept is not None]
        data = torch.cat([part.flatten() for half in zip(*pairs, strict=True) for part in half])
    return Span(segment.tokens, segment.layers, data)


def _device(group: Any) -> torch.device:
    """Where a group sends from."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _received(nbytes: int, src: int, group: Any, device: torch.device) -> UInt8[Tensor, " bytes"]:
    part = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    dist.recv(part, src, group)
    return part


def _outlines(header: bytes, total: int, src: int) -> list[tuple[int, tuple[KeptLayer | None, ...], torch.dtype]]:
    """Tokens, layers and dtype of each span that a header announces.

    Raises:
        ValueError: It announces nothing of the kind, or not so many bytes.
    """
    try:
        found = []
        for said in json.loads(header):
            layers = tuple(
                None if kept is None else KeptLayer(tuple(map(int, kept[0])), tuple(map(int, kept[1])), *kept[2:])
                for kept in said["layers"]
            )
            found.append((int(said["tokens"]), layers, _DTYPES[said["dtype"]]))
        nbytes = sum(places(layers, tokens)[1] * dtype.itemsize for tokens, layers, dtype in found)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise ValueError(f"rank {src} sends what is no cache: {type(e).__name__} {e}") from e
    if nbytes != total:
        raise ValueError(f"rank {src} announces {total} bytes of data for spans of {nbytes}")
    return found
