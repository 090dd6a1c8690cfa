"""Caches assembled from stored segments: `assemble(model, segments, boundary=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from redknot_hf.cache.argument import OF_GENERATE
from redknot_hf.cache.cache import RedKnotCache, row_layers
from redknot_hf.text.seams import Seams

from .assembly import put
from .ids import Texts, left_padded, one_for_each
from .question import choose
from .relocation import Relocation
from .schedule import BOUNDARY, Boundary, Refs, Reused, as_batch, is_spliced, schedule, store_of
from .store import SegmentRef, SegmentStore

# Share of the tokens that is recomputed for a question, unless said otherwise.
SHARE = 0.15


class AssembledCache(RedKnotCache):
    """A RedKnotCache whose tokens came from stored segments; used like any other.

    Attributes:
        reused: For each sequence of the batch, its segments in order. Tokens that the cache got since do not count.
        refreshed_tokens: Tokens that `refresh` chose and computed anew.
    """

    reused: tuple[tuple[Reused, ...], ...] = ()
    refreshed_tokens: int = 0

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that went through the model, over all sequences; a lead that sequences share counts for each."""
        return self.refreshed_tokens + sum(part.recomputed for sequence in self.reused for part in sequence)

    @property
    def reused_tokens(self) -> int:
        """Tokens of which stored keys and values were taken, over all sequences."""
        return sum(len(part.ref) for sequence in self.reused for part in sequence) - self.recomputed_tokens


@torch.no_grad()
def assemble(  # noqa: PLR0913 - all but two have defaults
    model: Any,
    segments: Refs,
    *,
    boundary: Boundary | None = None,
    question: Texts | None = None,
    share: float | int = SHARE,
    page_size: int = 64,
    max_cache_len: int | None = None,
    impl: str | None = None,
    force: bool = False,
) -> AssembledCache:
    """Builds the cache of a context out of stored segments.

    Of every segment the first tokens, the boundary, run through the model on all that stands before them, so their
    keys and values are right in this context; the stored rest is rotated to its place and put into the pages. A
    segment whose prefix is exactly what stands before it needs neither. The boundaries of all segments share a forward
    pass, of up to 8192 tokens. The cache then serves `generate` with the whole prompt: `prompt(cache, question)` makes
    it, for as many questions as there are.

    With a `question`, what stands near words of it is recomputed too, wherever it stands, in the same pass. The cache
    is then made for this question: others find in it what they find in a cache of stored segments.

    Source: boundary replay of RedKnot, arXiv 2606.06256, and of its later code (reuse of stored keys by position).

    Args:
        model: The model of the store.
        segments: What `SegmentStore.add` returned, in order; or a list of these for each sequence of a batch, where
            the segments that all sequences begin with are put in place once.
        boundary: Tokens of each segment to recompute, or a share of it (a float); one value, one for each segment, or
            a function of the segment and its position. `"all"` recomputes everything, which is a dense prefill, and
            `0` nothing, which is naive reuse. By default a tenth, and nothing where there is a question.
        question: Ids of what will be asked, one question for each sequence; they are not put into the cache. The store
            has to keep all that the chosen tokens look at: `keep="full"`, unless all heads are global.
        share: How much of the tokens that are not right as stored is recomputed for the question, at most.
        page_size, max_cache_len, impl: Of the cache.
        force: Reuse even if the model fails the store's gate.

    Returns:
        The cache, of which the caller may do as with any other.

    Raises:
        ValueError: There are no segments, they come from several stores or another model, the model's keys cannot be
            moved, or an argument is off.
    """
    batch = as_batch(segments)
    store = store_of(batch, model)
    store.check_weights()
    cache = AssembledCache(model.config, store.plan, page_size=page_size, max_cache_len=max_cache_len, impl=impl)
    if boundary is None:
        boundary = BOUNDARY if question is None else 0
    cache.reused = tuple(schedule(sequence, boundary) for sequence in batch)
    if question is not None:
        _check_keeps(store, cache)
        asked = zip(cache.reused, one_for_each(question, batch, "questions"), strict=True)
        cache.reused = tuple(choose(parts, ids, share) for parts, ids in asked)
    spliced = any(is_spliced(part) for parts in cache.reused for part in parts)
    relocation = relocation_of(store, force) if spliced else None
    # What all sequences begin with is put in place once, and the pages are shared.
    lead = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*cache.reused, strict=False)))
    if lead:
        put(model, cache, store, [cache.reused[0][:lead]], relocation)
    if lead and len(batch) > 1:
        cache.batch_repeat_interleave(len(batch))
    if any(len(parts) > lead for parts in cache.reused):
        put(model, cache, store, [parts[lead:] for parts in cache.reused], relocation)
    return cache


def prompt(
    context: Refs | AssembledCache,
    suffixes: Texts | str | Sequence[str],
    device: torch.device | str | None = None,
    *,
    cache: AssembledCache | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """What `generate` takes for a question: ids and mask of contexts and suffixes, padded on the left.

    Of a cache it makes as many prompts as there are questions: each brings a fork of it, so that none finds the answer
    to another one behind the context. `model.generate(**prompt(cache, question))`.

    Args:
        context: The assembled cache; or the segments as given to `assemble`, where the caller passes the cache on.
        suffixes: Token ids of what follows each context; those of one sequence may stand bare. With a tokenizer, text.
        device: Of the model; by default the cache's, where there is one.
        cache: Made of these segments: the prompt then brings a fork of it.
        tokenizer: The model's, or the `Seams` that the context was made with: suffixes are then questions as text.

    Returns:
        `input_ids` and `attention_mask`, `[batch, tokens]`, and with a cache the fork, as `generate` names it.

    Raises:
        ValueError: There is not one suffix of token ids for each sequence; or the cache was assembled of other
            segments or in another order, or holds more than its context.
    """
    if isinstance(context, AssembledCache):
        cache, batch = context, [[part.ref for part in parts] for parts in context.reused]
    else:
        batch = as_batch(context)
    if tokenizer is not None:
        suffixes = Seams.of(tokenizer).questions(suffixes)
    ends = one_for_each(suffixes, batch, "suffixes")
    if not all(ends):
        raise ValueError("a suffix has no tokens: give what follows the context, one token at least")
    halves = [left_padded([[i for ref in refs for i in ref.ids] for refs in batch]), left_padded(ends)]
    if cache is not None:
        _check_context(cache, batch, halves[0][0].shape[1])
        device = next(layer.device for _, layer in row_layers(cache)) if device is None else device
    ids, real = (torch.cat(parts, 1).to(device) for parts in zip(*halves, strict=True))
    made = {"input_ids": ids, "attention_mask": real}
    return made if cache is None else made | {OF_GENERATE: cache.fork()}


def _check_context(cache: AssembledCache, batch: Sequence[Sequence[SegmentRef]], slots: int) -> None:
    held = [[part.ref for part in parts] for parts in cache.reused]
    if held != [list(refs) for refs in batch]:
        raise ValueError(
            f"the cache was assembled of {held} and the prompt is of {[list(refs) for refs in batch]}: give the "
            "segments in the same order, or the cache in their place"
        )
    if cache.get_seq_length() != slots:
        raise ValueError(
            f"the cache holds {cache.get_seq_length()} tokens and its context has {slots}: a question of its own no "
            "longer follows the context. Ask forks, cache.fork(); or assemble again."
        )


def _check_keeps(store: SegmentStore, cache: RedKnotCache) -> None:
    """Raises if tokens in the midst of a segment cannot be recomputed: they look at what is not kept."""
    layers = [layer for _, layer in row_layers(cache)]
    whole = all(layer.sliding_window is None and all(spec.is_global for spec in layer.specs) for layer in layers)
    if store.keep != "full" and not whole:
        raise ValueError("the store keeps what the plan says, and tokens in the midst of a text look at more of local "
                         "heads: make it SegmentStore(..., keep='full')")  # fmt: skip


def relocation_of(store: SegmentStore, force: bool) -> Relocation | None:
    """How keys move, if the model may be reused."""
    verdict = store.verdict()
    if not verdict.passed and not force:
        raise ValueError(
            f"segments are not reused: {verdict.reason} Pass boundary='all', or force=True to do it still."
        )
    return verdict.relocation
