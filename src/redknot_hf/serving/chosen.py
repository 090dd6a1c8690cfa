"""Tokens that were chosen, on their way from the device to the requests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .request import Token
from .scheduler import Sequence as Served


class Chosen(NamedTuple):
    """Tokens that the device has chosen, or will have.

    Attributes:
        sequences: Whose.
        tokens: On the host, when `ready`.
        ready: What to wait for; `None` where nothing is.
        likely: Log-probabilities, values and ids of the likeliest, by index of the sequences that asked.
    """

    sequences: list[Served]
    tokens: Int[Tensor, " sequences"]
    ready: Any
    likely: dict[int, tuple[Tensor, Tensor, Tensor]]

    @property
    def come(self) -> bool:
        """Whether they are on the host already."""
        return self.ready is None or self.ready.query()


def on_its_way(
    sequences: list[Served], chosen: Int[Tensor, " sequences"], likely: dict[int, tuple[Tensor, Tensor, Tensor]]
) -> Chosen:
    """Tokens on their way to the host, which does not wait for them."""
    if chosen.device.type != "cuda":
        return Chosen(sequences, chosen, None, likely)
    host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
    host.copy_(chosen, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return Chosen(sequences, host, ready, likely)


def told(token: int, likely: tuple[Tensor, Tensor, Tensor] | None) -> Token:
    """A token as requests are told of it."""
    if likely is None:
        return _token(token)
    own, values, ids = likely
    return Token(token, float(own[0]), tuple(zip(ids[0].tolist(), values[0].tolist(), strict=True)))


@lru_cache(maxsize=1 << 14)
def _token(token: int) -> Token:
    return Token(token)
