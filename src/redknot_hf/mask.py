"""The mask function `"redknot"`: padding stays a row of flags, and only unusual patterns become a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask


class PaddingMask(torch.Tensor):
    """Which slots hold real tokens, `[batch, 1, 1, slots]` of bool; what comes after what goes without saying.

    Four dimensions let it pass transformers' mask code a second time unchanged. The class tells it from a mask of the
    caller's own.

    Attributes:
        window: Tokens that the model's sliding layers see back, where that is less than the mask is long. Some models
            say so to the mask function only.
    """

    window: int | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, PaddingMask):  # a part of the mask, or the mask on another device
            out.window = next((x.window for x in args if isinstance(x, PaddingMask)), None)
        return out

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
        packed sequences, overlays, chunks, two-sided attention and pre-allocated caches, the explicit `[batch, 1,
        queries, keys]`.

    Raises:
        ValueError: The 2-D mask is of another batch, or does not reach to the last slot.
    """
    if attention_mask is not None and attention_mask.shape[0] != batch_size:
        raise ValueError(f"the attention mask has {attention_mask.shape[0]} rows: give one for each of {batch_size}")
    last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    # Of the local patterns only the sliding window needs no matrix: chunks, say, do not end where the query is.
    reach = kwargs.get("local_size")
    chunked = reach is not None and reach != getattr(kwargs.get("config"), "sliding_window", None)
    if use_vmap or not allow_is_causal_skip or not last or chunked:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap, **kwargs,
        )  # fmt: skip
    slots = kv_offset + kv_length
    window = None if reach is None or reach >= kv_length else reach
    if attention_mask is None and window is None:
        return None
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, slots, dtype=torch.bool, device=kwargs.get("device"))
    if attention_mask.shape[1] < slots:
        raise ValueError(
            f"the attention mask has {attention_mask.shape[1]} columns: give one for each of {slots} slots, the "
            f"{slots - q_length} before this step and its {q_length}"
        )
    mask = attention_mask[:, None, None, kv_offset:slots].as_subclass(PaddingMask)
    mask.window = window
    return mask


AttentionMaskInterface.register("redknot", redknot_mask)
