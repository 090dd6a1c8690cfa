"""The mask function `"redknot"`: padding stays a row of flags, and only unusual patterns become a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from redknot_hf.cache.handle import is_answer
from redknot_hf.cache.step import BROKEN_OFF

# What models and device hooks do to a mask on its way to the attention function.
_PASSING_ON = {
    *(getattr(Tensor, name) for name in ("to", "cpu", "cuda", "clone", "detach", "contiguous", "as_subclass")),
    *(getattr(Tensor, name) for name in ("__getitem__", "narrow", "expand", "index_select", "repeat_interleave")),
    Tensor.__repr__,
}


_TOO_FEW_COLUMNS = (
    "the attention mask has {} columns: give one for each of {} slots, the {} before this step and its {}"
)


class PaddingMask(torch.Tensor):
    """Which slots hold real tokens, `[batch, 1, 1, slots]` of bool; what comes after what goes without saying.

    Four dimensions let it pass transformers' mask code a second time unchanged. The class tells it from a mask of the
    caller's own. A model that computes with it, because it does not use transformers' attention interface, would miss
    that attention is causal; so it can be cut and moved, and anything else raises.

    Attributes:
        whole: Every slot is real; the flags then are one element, expanded.
        window: Tokens that the model's sliding layers see back, where that is less than the mask is long. Some models
            say so to the mask function only.
    """

    whole: bool = False
    window: int | None = None

    @classmethod
    def make(cls, flags: Bool[Tensor, "batch 1 1 slots"], whole: bool, window: int | None) -> PaddingMask:
        """Makes a mask of flags."""
        mask = flags.as_subclass(cls)
        mask.whole, mask.window = whole, window
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func not in _PASSING_ON and not is_answer(func, out):
            raise RuntimeError(
                f"{getattr(func, '__name__', func)} was called on the attention mask of "
                "attn_implementation='redknot', so this model does not use transformers' attention interface. Load it "
                "without attn_implementation='redknot', and use DynamicCache with it."
            )
        if isinstance(out, PaddingMask):  # a part of the mask, or the mask on another device
            out.whole, out.window = args[0].whole, args[0].window
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
            RuntimeError: The layers of the cache disagree about their length.
        """
        memo = getattr(self, "_seen", None)
        if memo is None or memo[0] != (start, tokens):
            if self.shape[-1] != start + tokens:
                raise RuntimeError(BROKEN_OFF)
            real = None
            if not self.whole:
                flags = self.plain()[:, 0, 0]
                _check_past(flags[:, :start].sum(1).cpu().numpy(), start, lengths)
                real = flags[:, start : start + tokens].clone()  # kept longer than the mask, which is the caller's
                real = None if bool(real.all()) else real
            memo = self._seen = ((start, tokens), real)
        if self.whole and lengths.tolist() != [start] * len(lengths):
            _check_past(np.full_like(lengths, start), start, lengths)
        return memo[1]


def _check_past(seen: Int[np.ndarray, " batch"], start: int, lengths: Int[np.ndarray, " batch"]) -> None:
    if (seen != lengths).any():
        b = int(np.flatnonzero(seen != lengths)[0])
        raise ValueError(
            f"the attention mask shows {seen[b]} of the first {start} tokens of sequence {b}, and the cache holds "
            f"{lengths[b]} of them. Padding is skipped when it is stored, so the mask over past tokens must be passed "
            "again as it was (no mask shows all); start a new cache to change it."
        )


def describes_new_tokens(mask: Tensor, tokens: int) -> bool:
    """Whether a mask says of a step's tokens which are real, and no more: `[batch, 1, 1, tokens]` of bool."""
    return mask.dtype == torch.bool and tuple(mask.shape[1:]) == (1, 1, tokens)


def real_tokens(mask: Bool[Tensor, "batch 1 1 tokens"]) -> Bool[Tensor, "batch tokens"] | None:
    """The flags of such a mask, `None` if all are set; kept, so that the layers of a forward pass wait once."""
    if not hasattr(mask, "_real"):
        flags = mask[:, 0, 0]
        mask._real = None if bool(flags.all()) else flags.clone()  # pyright: ignore[reportAttributeAccessIssue]
    return mask._real  # pyright: ignore[reportAttributeAccessIssue]


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
        A `PaddingMask` where queries are the last slots and see back as far as their heads do; else, for
        packed sequences, overlays, chunks, two-sided attention and pre-allocated caches, the explicit `[batch, 1,
        queries, keys]`.

    Raises:
        ValueError: The 2-D mask is of another batch, or does not reach to the last slot.
    """
    if attention_mask is not None and attention_mask.shape[0] != batch_size:
        raise ValueError(f"the attention mask has {attention_mask.shape[0]} rows: give one for each of {batch_size}")
    if kv_length == q_length and (isinstance(kv_offset, Tensor) or kv_offset > 0):
        if not use_vmap and (q_length == 1 or allow_is_causal_skip):  # one token sees no more by an overlay
            return _flags_of_new_tokens(batch_size, q_length, kv_offset, attention_mask, kwargs.get("device"))
        kv_length, kv_offset = int(kv_offset) + kv_length, 0  # a pattern says which of all slots are seen
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
    if attention_mask is None:
        flags = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=kwargs.get("device"))
        return PaddingMask.make(flags.expand(batch_size, 1, 1, kv_length), True, window)
    if attention_mask.shape[1] < slots:
        raise ValueError(_TOO_FEW_COLUMNS.format(attention_mask.shape[1], slots, slots - q_length, q_length))
    return PaddingMask.make(attention_mask[:, None, None, kv_offset:slots], False, window)


def _flags_of_new_tokens(
    batch: int, tokens: int, offset: int | Tensor, mask: Bool[Tensor, "batch seen"] | None, device: Any
) -> Bool[Tensor, "batch 1 1 tokens"]:
    """For a step that may be captured: which of its tokens are real, in a shape that does not depend on the past."""
    if mask is None:
        return torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=device)
    slots = mask.shape[1] if isinstance(offset, Tensor) else offset + tokens
    if mask.shape[1] < slots:
        raise ValueError(_TOO_FEW_COLUMNS.format(mask.shape[1], slots, slots - tokens, tokens))
    new = mask[:, None, None, slots - tokens : slots]
    return new.clone(memory_format=torch.contiguous_format)  # strides that do not depend on the past either


AttentionMaskInterface.register("redknot", redknot_mask)
