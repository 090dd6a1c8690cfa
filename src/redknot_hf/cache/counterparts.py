"""The layers of a RedKnotCache: one for each that transformers' own cache would have, where there is one."""

from __future__ import annotations

from typing import Any

from redknot_kernels import implementation
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from redknot_hf.plan.plan import HeadPlan

from .layer import RedKnotLayer

PAGE_SIZES = (16, 32, 64, 128)
_MOST_HOT = 1 << 20


def layers_of(
    config: PreTrainedConfig, plan: HeadPlan, page_size: int, max_cache_len: int | None, impl: str | None, hot: int
) -> list[Any]:
    """Makes the layers, empty; the arguments are the cache's.

    Raises:
        ValueError: An argument is off, or a layer keeps its tokens in a way that pages do not hold.
        ImportError: `impl="triton"` without Triton.
    """
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size={page_size}: choose one of {PAGE_SIZES}")
    if max_cache_len is not None and max_cache_len < 1:
        raise ValueError(f"max_cache_len={max_cache_len}: give a positive number of tokens, or None to grow")
    if type(hot) is not int or not 0 <= hot <= _MOST_HOT:
        raise ValueError(f"hot={hot!r}: give 0 to {_MOST_HOT} tokens")
    implementation(impl)  # so that a wrong name, or no Triton, is told at once
    template = DynamicCache(config=config).layers
    return [_layer(plan, i, layer, page_size, max_cache_len, impl, hot) for i, layer in enumerate(template)]


def check_model(config: PreTrainedConfig) -> None:
    """Checks that a model's heads keep keys and values of their own.

    Raises:
        ValueError: They do not.
    """
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"{config.model_type} caches latents (MLA, kv_lora_rank={config.kv_lora_rank}) in place of the keys and "
            "values of its heads, so no head can keep less than another. Use DynamicCache with this model."
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(
            f"{config.model_type} attends in chunks of {config.attention_chunk_size} tokens, which RedKnotCache does "
            "not know. Use DynamicCache with this model."
        )


def _layer(
    plan: HeadPlan, index: int, template: Any, page_size: int, max_cache_len: int | None, impl: str | None, hot: int
) -> Any:
    """The cache layer for what `DynamicCache` would use there; layers without keys stay transformers' own."""
    if type(template) is DynamicLayer:
        return RedKnotLayer(plan[index], None, page_size, max_cache_len, impl, hot)
    if type(template) is DynamicSlidingWindowLayer:
        return RedKnotLayer(plan[index], template.sliding_window, page_size, max_cache_len, impl, hot)
    if type(template) is LinearAttentionLayer or type(template).__name__ == "DummyLayer":
        return template
    raise ValueError(
        f"layer {index} keeps its tokens in a {type(template).__name__}, which RedKnotCache has no counterpart for; "
        "use DynamicCache with this model"
    )
