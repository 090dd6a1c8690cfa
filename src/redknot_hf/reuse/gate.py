"""Whether stored segments of a model can be reused: checked on the model itself, before the first reuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from redknot_hf.attention.devices import input_device
from redknot_hf.cache.argument import cache_argument
from redknot_hf.cache.cache import RedKnotCache, row_layers
from redknot_hf.cache.packing import splice
from redknot_hf.plan.plan import HeadPlan

from .recording import forward, record
from .relocation import Relocation

# Error that rounding explains, relative to the norm of what is compared. Without RoPE, say, it is about 1.
_ALLOWED, _ALLOWED_IN_HALF = 1e-3, 1e-1
_TOKENS, _SHIFT = 48, 301


@dataclass(frozen=True)
class Verdict:
    """What a model's reuse was found to do.

    Attributes:
        relocation: How keys move; `None` if they cannot.
        keys_error: Of a text's keys moved by some hundred positions against those computed there, at most over layers.
        logits_error: Of the logits behind a stored text in its own place, against those of reading it.
        reason: Why reuse is refused; empty if it is not.
    """

    relocation: Relocation | None
    keys_error: float
    logits_error: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether segments may be reused."""
        return not self.reason


@torch.no_grad()
def gate(model: Any, plan: HeadPlan, *, page_size: int = 64, impl: str | None = None) -> Verdict:
    """Checks that reuse means what it should for a model; takes a handful of short forward passes.

    Two things are held against the model's own computation. Relocation: a text is run at two places, and the keys of
    every layer of the one must turn into those of the other; a model whose positions enter by any other way than RoPE
    fails. Fidelity: a text is stored behind a prefix and put back behind it, and what follows must get the logits that
    it gets when all is read; a model whose layers keep more than keys and values fails.

    Raises:
        ValueError: The cache cannot serve the model at all.
    """
    try:
        relocation = Relocation.of(model)
    except ValueError as e:
        return Verdict(None, float("nan"), float("nan"), str(e))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    text = torch.randint(vocabulary, (_TOKENS,), generator=generator).tolist()
    keys = _keys_error(model, relocation, text)
    logits = _logits_error(model, plan, text, page_size, impl)
    allowed = _ALLOWED_IN_HALF if model.dtype.itemsize < 4 else _ALLOWED
    for what, error in (
        ("its keys, moved to other positions, are not those computed there", keys),
        ("a stored text in its own place is not what reading it is", logits),
    ):
        if not error <= allowed:
            kind = model.config.model_type
            reason = f"{kind}: {what} (error {error:.2g} of their norm, {allowed:.0e} allowed)"
            return Verdict(relocation, keys, logits, reason)
    return Verdict(relocation, keys, logits)


def _keys_error(model: Any, relocation: Relocation, text: list[int]) -> float:
    limit = relocation.limit
    shift = _SHIFT if limit is None else max(1, min(_SHIFT, limit - _TOKENS))
    here = torch.arange(len(text))
    caches = [_read(model, text, here + by) for by in (0, shift)]
    errors = []
    for i, (there, elsewhere) in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        if getattr(there, "keys", None) is None:
            continue
        moved = relocation.rerotate(there.keys, i, here.to(there.keys.device), (here + shift).to(there.keys.device))
        errors.append(_relative(moved, elsewhere.keys))
    return max(errors)


def _read(model: Any, text: list[int], places: Tensor) -> DynamicCache:
    cache = DynamicCache()  # without the config: sliding layers would forget
    ids = torch.tensor([text], device=input_device(model))
    model(
        input_ids=ids,
        position_ids=places[None].to(input_device(model)),
        logits_to_keep=1,
        **cache_argument(model, cache),
    )
    return cache


def _logits_error(model: Any, plan: HeadPlan, text: list[int], page_size: int, impl: str | None) -> float:
    prefix, middle, end = text[:8], text[8:40], text[40:]
    read, reused = (RedKnotCache(model.config, plan, page_size=page_size, impl=impl) for _ in range(2))
    forward(model, read, [prefix + middle])
    forward(model, reused, [prefix])
    (segment,) = record(model, plan, [middle], prefix, addresses=["gate"], page_size=page_size, impl=impl)
    for i, layer in row_layers(reused):
        splice(layer.storage, i, 0, segment)
        layer.storage.left_align()
    ids = torch.tensor([end], device=input_device(model))
    found, wanted = (model(input_ids=ids, **cache_argument(model, cache)).logits for cache in (reused, read))
    return _relative(found, wanted)


def _relative(found: Float[Tensor, "..."], wanted: Float[Tensor, "..."]) -> float:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()
