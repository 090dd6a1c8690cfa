"""The new tokens of one forward pass through one layer, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from redknot_kernels import Cold, Context, HeadRules
from torch import Tensor

if TYPE_CHECKING:
    from .storage import Storage

Query = Float[Tensor, "batch query_heads tokens key_dim"]
Output = Float[Tensor, "batch tokens query_heads value_dim"]
Real = Bool[Tensor, "batch tokens"]

BROKEN_OFF = (
    "the layers of the cache hold different numbers of tokens: a forward pass broke off between them. Call "
    "cache.reset() and read the text again."
)


@dataclass
class Group:
    """Tokens of a step that are attended together: of all sequences, or the real ones of a single sequence.

    Attributes:
        sequences: Which sequences.
        real: Indices of the tokens that are no padding; `None` if all.
        context: The past as it was before the step, if the step is too long to be read back from the pages.
        cold: The cold pages as they were before the step, if it is not too long.
    """

    sequences: slice
    real: Int[Tensor, " tokens"] | None
    context: Context | None = None
    cold: Cold | None = None

    def take(self, tensor: Float[Tensor, "batch heads tokens dim"]) -> Float[Tensor, "group heads group_tokens dim"]:
        """The group's part of a tensor over the whole step."""
        tensor = tensor[self.sequences]
        return tensor if self.real is None else tensor.index_select(2, self.real)


class Kept(NamedTuple):
    """What rows hold of heads of one kind.

    Attributes:
        rules: The rule of each head.
        heads: Which they are.
        positions: Where the tokens stand.
        keys, values: `[batch, heads, positions, dim]`.
    """

    rules: HeadRules
    heads: tuple[int, ...]
    positions: Int[Tensor, " positions"]
    keys: Float[Tensor, "batch heads positions key_dim"]
    values: Float[Tensor, "batch heads positions value_dim"]

    @classmethod
    def of_band(
        cls,
        rules: HeadRules,
        heads: tuple[int, ...],
        length: int,
        keys: Float[Tensor, "batch heads held key_dim"],
        values: Float[Tensor, "batch heads held value_dim"],
    ) -> Kept:
        """What local heads of one rule hold of sequences of a length: their band of a `Context`, each token once."""
        held = min(rules.sink[0], length)
        first = max(length - rules.window[0] + 1, 0)
        again = max(held - first, 0)  # sinks that the band repeats
        span = partial(torch.arange, device=keys.device)
        positions = torch.cat([span(held), span(first + again, length)])
        keys, values = (torch.cat([x[:, :, :held], x[:, :, held + again :]], 2) for x in (keys, values))
        return cls(rules, heads, positions, keys, values)


@dataclass
class Step:
    """The new tokens of one forward pass through one layer.

    Attributes:
        storage: Where they go.
        tokens: Slots of the step, padding included.
        start: Slots of the cache before them.
        written: The storage has taken them.
        real: Which of them are no padding; `None` if all.
        groups: Which of them are attended together, where they are not attended as they are written.
        past: What the rows held before, where whoever attends asked for it.
        attend: Writes and attends the step in place of the storage: takes it, queries, mask and options. It is the one
            way to stand in for attention (reuse, refresh).
        captured: What does the same inside of `torch.compile`; takes the step, queries and options. Without it only
            the storage itself can be captured.
        said: What the cache's config calls the model's attention implementation.
    """

    storage: Storage
    key: Float[Tensor, "batch heads tokens key_dim"]
    value: Float[Tensor, "batch heads tokens value_dim"]
    tokens: int
    start: int
    written: bool = False
    real: Real | None = None
    groups: list[Group] = field(default_factory=list)
    past: Any = None
    attend: Callable[..., Tensor] | None = None
    captured: Callable[..., Tensor] | None = None
    said: str | None = None
