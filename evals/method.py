"""What a method is: a way from a model and a context to a cache that holds the context.

A method has no other part in an answer. Question and answer go through the model and a fork of its cache, and the
harness does that itself, so that the first token comes the same way as the later ones, and the tokens that are judged
are those that are timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

CHUNK = 8192  # tokens of each row that are read at once


@dataclass(frozen=True)
class Context:
    """What is read before the questions: rows of unequal length, padded on the left.

    Attributes:
        rows: Token ids of each text, `[tokens]`.
        documents: Of each text its parts in order, `[tokens]` each, which joined are the row; empty where the task
            names none.
        room: Tokens that follow the context at most: a question and its answer.
    """

    rows: tuple[Tensor, ...]
    documents: tuple[tuple[Tensor, ...], ...]
    room: int

    @property
    def ids(self) -> Tensor:
        """The rows as one tensor, `[rows, slots]`; padding is token 0."""
        return pad_left(self.rows)

    @property
    def mask(self) -> Tensor:
        """Which slots hold tokens, `[rows, slots]` of int64."""
        return pad_left([torch.ones_like(row) for row in self.rows])


@dataclass(frozen=True)
class Method(ABC):
    """A way to hold a context.

    Attributes:
        name: How reports call it.
        attention: The `attn_implementation` that the model runs with.
        identity: What makes it this method and no other, as JSON can hold it; records are kept by it.
        batched: Whether it can hold several rows, and rows repeated.
    """

    name: str
    attention: str = "sdpa"
    identity: dict[str, Any] = field(default_factory=dict)
    batched: bool = True

    @abstractmethod
    def prepare(self, model: Any, context: Context) -> Cache:
        """Return a cache that holds the context, to be forked and never written to.

        The model already runs with `attention`, and all tensors are on its device.

        Raises:
            ImportError: The method needs a library that is missing.
            ValueError: It cannot serve this model or context.
        """

    def check(self, cache: Cache) -> None:  # noqa: B027 - most methods promise nothing more
        """Check that a cache is what the method says it is.

        Raises:
            ValueError: It is not.
        """

    def fork(self, cache: Cache) -> Cache:
        """Return a cache to go on with; the original stays as it is."""
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            return shared(cache)
        return deepcopy(cache)

    def resident_bytes(self, cache: Cache) -> int:
        """Return the bytes of keys and values that the cache holds."""
        if hasattr(cache, "nbytes"):
            return int(cache.nbytes)  # pyright: ignore[reportAttributeAccessIssue]
        return sum(tensor.nbytes for layer in cache.layers for tensor in held_tensors(layer))


class Dense(Method):
    """Transformers' own growing cache, which keeps everything: what the others are measured against."""

    def prepare(self, model: Any, context: Context) -> Cache:
        return read(model, DynamicCache(config=model.config), context)


def dense() -> Dense:
    """Return the reference."""
    return Dense("dense")


@torch.no_grad()
def read(model: Any, cache: Cache, context: Context) -> Cache:
    """Run a context through a model into a fresh cache, which is mutated and returned."""
    ids, mask = context.ids, context.mask
    positions = positions_of(mask)
    start = 0
    for chunk in ids.split(CHUNK, dim=1):
        stop = start + chunk.shape[1]
        model(
            input_ids=chunk, attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
            logits_to_keep=1, **by_name(cache),
        )  # fmt: skip
        start = stop
    return cache


def by_name(cache: Cache) -> dict[str, Cache]:
    """Return the argument that a model takes a cache by; a peer's transformers knows it by the older name.

    Peers run this file without redknot_hf, whose `cache_argument` asks the model itself.
    """
    known = GenerateDecoderOnlyOutput.__dataclass_fields__
    return {"cache" if "cache" in known else "past_key_values": cache}


def shared(cache: Cache) -> Cache:
    """Return a fork of a cache whose layers replace their tensors and never write into them: both share them."""
    other = copy(cache)
    other.layers = [copy(layer) for layer in cache.layers]
    return other


def positions_of(mask: Tensor) -> Tensor:
    """Return each slot's place in its text, padding not counted: `[rows, slots]` to `[rows, slots]`."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def pad_left(rows: Sequence[Tensor]) -> Tensor:
    """Return rows `[tokens]` of unequal length as `[rows, slots]`, zeros before the shorter ones."""
    longest = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])


def held_tensors(layer: Any) -> list[Tensor]:
    """Return the tensors in which a layer of transformers' caches holds keys and values, whatever their format."""
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return [part for name in names for part in _parts(getattr(layer, name, None))]


def _parts(held: Any) -> list[Tensor]:
    """The plain tensors within what a backend of quantisation stores."""
    if isinstance(held, (tuple, list)):
        return [part for one in held for part in _parts(one)]
    if isinstance(held, dict):
        return [part for one in held.values() for part in _parts(one)]
    if isinstance(held, Tensor) and hasattr(held, "__tensor_flatten__"):
        return [part for name in held.__tensor_flatten__()[0] for part in _parts(getattr(held, name))]  # pyright: ignore
    return [held] if isinstance(held, Tensor) else []
