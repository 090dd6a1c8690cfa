"""Recomputing the tokens of reused segments that matter most, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from redknot_kernels import Rotation, rotate
from torch import Tensor

from redknot_hf.attention.devices import input_device
from redknot_hf.cache.argument import cache_argument
from redknot_hf.cache.cache import row_layers
from redknot_hf.cache.handle import RedKnotHandle
from redknot_hf.cache.layer import RedKnotLayer
from redknot_hf.cache.packing import splice
from redknot_hf.cache.span import KeptLayer, Span
from redknot_hf.cache.step import Step

from .assemble import AssembledCache, assemble, relocation_of
from .assembly import check_room, turns_of
from .scattered import ScatteredPass, initialize
from .schedule import Refs, Reused, as_batch, schedule, store_of
from .segment import Segment

By = Literal["deviation", "attention", "question"]
# The last queries, whose attention chooses tokens.
_LAST = 64

Heads = Float[Tensor, "1 heads tokens dim"]


@torch.no_grad()
def refresh(  # noqa: PLR0913 - all but two have defaults
    model: Any,
    segments: Refs,
    *,
    share: float | int = 0.15,
    by: str = "deviation",
    depth: int = 1,
    question: Sequence[int] | None = None,
    page_size: int = 64,
    max_cache_len: int | None = None,
    impl: str | None = None,
    force: bool = False,
) -> AssembledCache:
    """Builds the cache of a context out of stored segments and recomputes the tokens that need it most.

    All tokens run through the first layers, which then are right. What they show at the next one chooses tokens, and
    these run through all layers while every key of the context, stored or new, is at hand. It is an alternative to
    the boundary of `assemble`, at the price of storing all tokens of all heads and of running the first layers whole.

    Source: CacheBlend, arXiv 2405.16444, section 4 (deviation of keys and values); heavy hitters, H2O,
    arXiv 2306.14048 (attention received).

    Args:
        model: The model of the store.
        segments: Of one sequence, from a store with `keep="full"`.
        share: How much of what is not right as stored is recomputed, 0 to 1.
        by: `"deviation"`: tokens whose keys and values at layer `depth` are farthest from the stored ones;
            `"attention"`: tokens that the last ones of the context look at most there; `"question"`: what stands near
            words of the `question`, which `assemble` does too, and no token runs through the first layers for it.
        depth: Layers that all tokens run through, at least 1.
        question: Ids of what will be asked, for `by="question"`.
        page_size, max_cache_len, impl, force: As for `assemble`.

    Raises:
        ValueError: As `assemble`; the store keeps less than all, there are several sequences, or an argument is off.
    """
    batch = as_batch(segments)
    store = store_of(batch, model)
    store.check_weights()
    _check(store.keep, len(batch), share, by, depth, model.config.get_text_config(decoder=True).num_hidden_layers)
    options: dict[str, Any] = {"page_size": page_size, "max_cache_len": max_cache_len, "impl": impl}
    if (by == "question") != (question is not None):
        raise ValueError(f"by={by!r}: by='question' needs a question, and the others take none")
    if question is not None:
        return assemble(model, segments, boundary=0, question=question, share=share, force=force, **options)
    relocation = relocation_of(store, force)
    cache = AssembledCache(model.config, store.plan, **options)
    parts = schedule(batch[0], 0)
    check_room(cache, sum(map(len, batch[0])))
    context = _Context(model, cache)
    for part in parts:
        segment = store.get(part.ref)
        context.add(segment, turns_of(part, segment, relocation))
    context.join()
    chosen = torch.zeros(0, dtype=torch.long)
    fixed = torch.cat([torch.full((len(p.ref),), p.ref.prefix == _before(parts, p)) for p in parts])
    if count := round(share * int((~fixed).sum())):
        chosen = _scores(model, context, by, depth).masked_fill(fixed, -torch.inf).topk(count).indices.sort().values
        context.run(model, chosen)
    context.put(cache)
    cache.reused, cache.refreshed_tokens = (parts,), len(chosen)
    return cache


class _Enough(Exception):  # noqa: N818 - no error: a pass has shown what it was made for
    """Ends a forward pass."""


class _Context(ScatteredPass):
    """Keys and values of a whole context, which a step of some of its tokens overwrites in place.

    Attributes:
        keys, values: Of each layer, `[1, heads, tokens, dim]`.
        positions: Tokens of the step under way.
        look: Called at layer `depth`, with the layer's queries, keys and values of the step; then the pass ends.
    """

    def __init__(self, model: Any, cache: AssembledCache) -> None:
        super().__init__(layers=cache.layers)
        self.model, self.cache = model, cache
        self.ids: list[int] = []
        self.kept: tuple[KeptLayer | None, ...] = ()
        self.dtype = model.dtype
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i, _ in row_layers(cache)}
        self.keys: dict[int, Heads] = {}
        self.values: dict[int, Heads] = {}
        self.positions: Int[Tensor, " step"] = torch.zeros(0, dtype=torch.long)
        self.depth, self.look = -1, None

    def add(self, segment: Segment, turns: Sequence[Rotation | None]) -> None:
        """Continues the context by a segment."""
        initialize(self.cache, self.model, segment, 1)
        for i, layer in row_layers(self.cache):
            heads = layer.storage.rows.rules.heads
            keys, values = (x.view(1, heads, segment.tokens, -1) for x in segment.pair(i))
            turn = turns[i]
            self._parts[i].append((keys if turn is None else rotate(keys, turn), values))
        self.ids += segment.ids
        self.kept = segment.layers

    def join(self) -> None:
        """Makes one run of the segments; it may be written to from here on."""
        for i, layer in row_layers(self.cache):
            parts = zip(*self._parts.pop(i), strict=True)
            self.keys[i], self.values[i] = (torch.cat(half, 2).to(layer.device) for half in parts)

    def run(self, model: Any, positions: Int[Tensor, " step"], depth: int = -1, look: Callable | None = None) -> None:
        """Runs some of the context's tokens through the model, through all layers or until one has been looked at."""
        self.positions, self.depth, self.look = positions, depth, look
        ids = torch.tensor(self.ids)[positions].to(input_device(model))
        try:
            model(
                input_ids=ids[None], position_ids=positions[None].to(input_device(model)), logits_to_keep=1,
                **cache_argument(model, self),
            )  # fmt: skip
        except _Enough:
            return

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands the step's keys and values on; the attention function comes back here with them."""
        layer = self.cache.layers[layer_idx]
        assert isinstance(layer, RedKnotLayer)
        attend, tokens = partial(self._attend, layer_idx), key_states.shape[2]
        step = Step(layer.storage, key_states, value_states, tokens, 0, attend=attend)
        return RedKnotHandle.wrap(key_states, step), RedKnotHandle.wrap(value_states, step)

    def _attend(
        self, layer: int, step: Step, query: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Float[Tensor, "1 step query_heads value_dim"]:
        """Attends the step's tokens over all before them, as each head's rule and their positions say."""
        if layer == self.depth and self.look is not None:
            self.look(layer, query, step.key, step.value, options["scale"])
            raise _Enough
        keys, values, where = self.keys[layer], self.values[layer], self.positions.to(query.device)
        keys.index_copy_(2, where, step.key.to(keys.dtype))
        values.index_copy_(2, where, step.value)
        storage = step.storage
        if query.shape[2] == len(self.ids) > storage.page_size:
            return storage.kernels.prefill(query, keys, values, None, storage.rows.rules, **options)
        asked = where[-query.shape[2] :]  # a layer that shares keys may want its last tokens alone
        return storage.kernels.attend_at(query, keys, values, asked, storage.rows.rules.as_seen, **options)

    def put(self, cache: AssembledCache) -> None:
        """Lets the cache take what its heads keep."""
        flat = [x.flatten() for half in (self.keys, self.values) for x in half.values()]
        home = flat[0].device
        whole = Span(len(self.ids), self.kept, torch.cat([x.to(home) for x in flat]))
        for i, layer in row_layers(cache):
            splice(layer.storage, i, 0, whole)
            layer.storage.left_align()


def _scores(model: Any, context: _Context, by: str, depth: int) -> Float[Tensor, " tokens"]:
    """How much each token needs to be recomputed; runs all tokens through the first `depth` layers."""
    found: list[Float[Tensor, " tokens"]] = []

    def deviation(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        new_and_old = ((key, context.keys[layer]), (value, context.values[layer]))
        found.append(sum((a.float() - b.float()).square().sum((0, 1, 3)) for a, b in new_and_old))  # pyright: ignore

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        last = torch.arange(len(context.ids), device=key.device)[-_LAST:]
        heads = key.shape[1]
        scores = query[:, :, -_LAST:].unflatten(1, (heads, -1)).float() @ key.unsqueeze(2).float().mT * scale
        seen = last[:, None] >= torch.arange(key.shape[2], device=key.device)
        found.append(scores.masked_fill(~seen, -torch.inf).softmax(-1).sum((0, 1, 2, 3)))

    everything = torch.arange(len(context.ids))
    context.run(model, everything, depth, deviation if by == "deviation" else attention)
    return found[0].cpu()


def _before(parts: Sequence[Reused], part: Reused) -> tuple[int, ...]:
    return tuple(token for other in parts if other.start < part.start for token in other.ref.ids)


def _check(keep: str, batch: int, share: float | int, by: str, depth: int, layers: int) -> None:
    if keep != "full":
        raise ValueError("the store keeps what the plan says, and a token may be refreshed only if all are kept: "
                         "make it SegmentStore(..., keep='full')")  # fmt: skip
    if batch > 1:
        raise ValueError(f"refresh serves one sequence at a time and got {batch}: call it for each")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: give a share from 0 to 1")
    if by not in get_args(By):
        raise ValueError(f"by={by!r}: choose one of {get_args(By)}")
    if not 1 <= depth < layers:
        raise ValueError(f"depth={depth}: give a number of layers from 1 to {layers - 1}")
