"""What travels between the door and replicas: what is wanted, what is known of it beforehand, and what has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from redknot_hf.serving.request import Sampling, State, Token

# Letters of an address by which replicas tell each other's segments apart; a wrong guess costs a fetch.
MARK = 16


@dataclass(frozen=True)
class Want:
    """What a router goes by.

    Attributes:
        segments: Addresses that are wanted, cut to `MARK` letters, and the bytes of each.
        prompt: Ids behind them.
        avoid: Names of replicas that were found to be gone.
    """

    segments: Mapping[str, int] = field(default_factory=dict)
    prompt: tuple[int, ...] = ()
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Errand:
    """A prompt for a replica.

    Attributes:
        prompt: Ids behind the segments.
        n: Answers to it.
        sampling: How they are chosen.
        segments: Ids and prefix of each, in order.
        boundary: What of them is recomputed in their places.
        priority, timeout: Of the request.
        answered: Ids of an answer that another replica has begun.
        apart: The prompt was read by another replica, and is in the store.
    """

    prompt: tuple[int, ...]
    n: int
    sampling: Sampling
    segments: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    boundary: Any = None
    priority: int = 0
    timeout: float | int | None = None
    answered: tuple[int, ...] = ()
    apart: bool = False


@dataclass
class News:
    """Of one answer, since the last.

    Attributes:
        index: Of the answer.
        tokens: That have come.
        cached: Tokens of the prompt that need not be read.
        state, reason, error: How it has ended; no state if it goes on.
    """

    index: int
    tokens: list[Token] = field(default_factory=list)
    cached: int = 0
    state: State | None = None
    reason: str = ""
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """Of a replica, and so of all.

    Attributes:
        config, generation_config, dtype: Of the model.
        identity: Of its weights, as its store has it; nothing where none is.
        refused: Why segments are not reused in other places; empty if they are.
        words: Ids that it knows.
        max_len, longest: Tokens of a prompt and its answer, at most: as was said, and as fit.
        page_size, columns: Of its pages.
    """

    config: Any
    generation_config: Any
    dtype: torch.dtype
    identity: str | None
    refused: str
    words: int
    max_len: int
    longest: int
    page_size: int
    columns: int
