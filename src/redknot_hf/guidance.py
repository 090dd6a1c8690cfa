"""Classifier-free guidance under a plan: both branches in caches of the caller's."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor
from transformers import (
    Cache,
    LogitsProcessorList,
    PreTrainedModel,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from redknot_hf.cache.argument import OF_GENERATE


def guidance(
    model: PreTrainedModel,
    scale: float,
    cache: Cache,
    ids: Int[Tensor, "batch negative"] | None = None,
    mask: Int[Tensor, "batch negative"] | None = None,
) -> LogitsProcessorList:
    """What `generate(guidance_scale=scale)` does, with a cache of the caller's for the unconditional branch.

    Pass it as `logits_processor`, and leave `guidance_scale` out, which reads that branch into a DynamicCache.

    Args:
        model: The model that generates.
        scale: 1 changes nothing, more follows the prompt more closely.
        cache: Of the unconditional branch; empty, and another than the one that `generate` is given. It is mutated.
        ids: The negative prompt; `None` takes the last token of the prompt.
        mask: Which of the negative prompt's slots hold tokens; `None` if all do.

    Raises:
        ValueError: The cache holds tokens.
    """
    if cache.get_seq_length():
        raise ValueError(
            f"the cache of the unconditional branch holds {cache.get_seq_length()} tokens: pass a new one, and "
            "another than generate's own"
        )
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model, ids, mask)  # pyright: ignore
    processor.unconditional_context[OF_GENERATE] = cache
    return LogitsProcessorList([processor])
