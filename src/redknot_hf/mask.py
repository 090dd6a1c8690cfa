"""The mask function `"redknot"`: padding stays a row of flags, and only unusual patterns become a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask


class PaddingMask(torch.Tensor):
    """Which slots hold real tokens, `[batch, 1, 1, slots]` of bool; what comes after what goes without saying.

    Four dimensions let it pass transformers' mask code a second time unchanged. The class tells it from a mask of the
    caller's own.
    """

    def plain(self) -> Bool[Tensor, "batch 1 1 slots"]:
        """The flags as an ordinary tensor."""
        return self.as_subclass(Tensor)

    def new_tokens(
        self, start: int, tokens: int, lengths: Int[np.ndarray, " batch"]
    ) -> Bool[Tensor, "batch tokens"] | None:
        """Which of a step's slots are real, or `None` if all are.

        The answer is kept, so that the layers of a forward pass read the mask once.

        Args:
            start: First slot of the step.
            tokens: Slots of the step.
            lengths: Real tokens that the cache holds of each sequence.

        Raises:
            ValueError: The mask hides tokens that the cache holds, or shows padding that it skipped.
        """
        memo = getattr(self, "_seen", None)
        if memo is None or memo[0] != (start, tokens):
            flags = self.plain()[:, 0, 0]
            seen = flags[:, :start].sum(1).cpu().numpy()
            if (seen != lengths).any():
                b = int(np.flatnonzero(seen != lengths)[0])
                raise ValueError(
                    f"the attention mask shows {seen[b]} of the first {start} tokens of sequence {b}, and the cache "
                    f"holds {lengths[b]} of them. Padding is skipped when it is stored, so the mask over past tokens "
                    "must stay what it was; start a new cache to change it."
                )
            real = flags[:, start : start + tokens]
            memo = self._seen = ((start, tokens), None if bool(real.all()) else real)
        return memo[1]


def redknot_mask(  # noqa: PLR0913 - what transformers passes
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Bool[Tensor, "batch seen"] | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Describes the mask of one forward pass (the signature is transformers').

    Returns:
        `None` or a `PaddingMask` where queries are the last slots and see back as far as their heads do; else, for
        packed sequences, overlays, two-sided attention and pre-allocated caches, the explicit `[batch, 1, queries,
        keys]`.
    """
    last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if use_vmap or not allow_is_causal_skip or not last:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap, **kwargs,
        )  # fmt: skip
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    flags = F.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
    return flags[:, None, None, kv_offset : kv_offset + kv_length].as_subclass(PaddingMask)


AttentionMaskInterface.register("redknot", redknot_mask)
