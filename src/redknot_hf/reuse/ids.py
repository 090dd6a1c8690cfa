"""Token ids as callers have them: lists, tensors and arrays of any integer kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

Ids = Sequence[Any] | Tensor | np.ndarray
# Of one sequence, or of each sequence of a batch.
Texts = Ids | Sequence[Ids]


def as_ids(ids: Any) -> tuple[int, ...]:
    """The ids of one text: `[tokens]`, or `[1, tokens]` as tokenizers return them.

    Raises:
        ValueError: They are no whole numbers, they are text, or they are several texts.
    """
    _check_form(ids)
    shape = getattr(ids, "shape", None)
    rows = ids.tolist() if shape is not None else list(ids)
    if (shape is None or len(shape) == 2) and len(rows) == 1 and _is_row(rows[0]):
        return as_ids(rows[0])
    if (shape is not None and len(shape) != 1) or any(map(_is_row, rows)):
        found = "several rows" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"a text of {found}: give the ids of one text, [tokens] or [1, tokens]")
    return tuple(map(_whole, rows))


def one_for_each(texts: Any, batch: Sequence[Any], what: str) -> list[tuple[int, ...]]:
    """Texts of a batch's sequences; one sequence may have its own bare.

    Raises:
        ValueError: There is not one for each, or one is no text of ids.
    """
    _check_form(texts)
    bare = len(texts) and not _is_row(texts[0])
    found = [as_ids(texts)] if bare else [as_ids(text) for text in texts]
    if len(found) != len(batch):
        raise ValueError(f"{len(found)} {what} for {len(batch)} sequences: give one for each")
    return found


def left_padded(texts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Texts as a tensor of ids, and which of them are real: 1, or 0 for the padding before shorter texts."""
    longest = max(map(len, texts))
    ids = [[0] * (longest - len(text)) + list(text) for text in texts]
    real = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(real, dtype=torch.long)


def _check_form(ids: Any) -> None:
    if isinstance(ids, str | bytes):
        raise ValueError(f"{ids!r:.40} is text: give its token ids, tokenizer(text)['input_ids']")
    if isinstance(ids, Mapping) or hasattr(ids, "input_ids"):
        raise ValueError("this is what a tokenizer returned: give its token ids, ['input_ids']")
    if not hasattr(ids, "__len__") or getattr(ids, "shape", True) == ():
        raise ValueError(f"{ids!r:.40} is no text: give a list, tensor or array of token ids")


def _is_row(part: Any) -> bool:
    return isinstance(part, str | bytes) or (hasattr(part, "__len__") and getattr(part, "shape", True) != ())


def _whole(token: Any) -> int:
    try:
        if not isinstance(token, bool | np.bool_) and "bool" not in str(getattr(token, "dtype", "")):
            return index(token)
    except TypeError:
        pass
    raise ValueError(f"a text has {token!r:.40} for a token id: give whole numbers, as tokenizers return them")
