"""The name under which a model takes its cache: transformers 5.24 calls `cache` what it called `past_key_values`."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .takeover import refuse_prefix

_NAMES = ("cache", "past_key_values")

# What `generate` calls it, in the arguments of a `custom_generate` and in its outputs.
OF_GENERATE = next(name for name in _NAMES if name in GenerateDecoderOnlyOutput.__dataclass_fields__)


def cache_argument(model: nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    """A cache as the keyword argument that a model takes it by: `model(ids, **cache_argument(model, cache))`.

    `generate` takes it by the same name.

    Args:
        model: Any model of transformers, or what wraps one (PEFT, `torch.compile`, data parallelism).

    Raises:
        TypeError: Neither the model nor any module of it takes a cache.
        ValueError: A wrapper would pass the model another one.
    """
    for module in model.modules():  # what wraps a model hands on what it is given
        if cache is not None:
            refuse_prefix(module)
        taken = inspect.signature(module.forward).parameters
        for name in _NAMES:
            if name in taken:
                return {name: cache}
    raise TypeError(f"{type(model).__name__} takes no cache: its forward pass knows neither of {_NAMES}")
