"""Attention under a mask of the caller's own, which says what comes after what; each head's window still holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from redknot_kernels import add_sink_logit, attend
from torch import Tensor

from redknot_hf.cache.step import Group, Kept, Output, Query, Step

# A mask of the caller's own: bool (True is visible), or added to the scores.
Explicit = Bool[Tensor, "#batch #query_heads tokens slots"] | Float[Tensor, "#batch #query_heads tokens slots"]
# What a mask adds to the score of a token that is not to be seen is at most this.
_HIDDEN = -1e4


def explicit_attention(query: Query, step: Step, mask: Tensor, options: dict[str, Any]) -> Output:
    """Writes a step, unless another layer has, and attends it under the mask.

    A new token that no query of the step sees is padding: it is not stored, as if a 2-D mask had hidden it, so either
    kind of mask may follow. What padding gets as output means nothing.

    Args:
        query: Of the step's last tokens.
        step: Written, and its past read, by the first layer that attends it.
        mask: Columns are slots, those of the step last; more may follow.
        options: `scale`, `softcap` and `s_aux`.

    Raises:
        ValueError: The mask has another shape or dtype, or shows a slot that was padding.
    """
    _check(mask, query, step)
    if step.past is None:
        _check_past(mask, step)
        real = _real(mask, step)
        step.past = list(_alike(step, real))
        step.storage.append(step, real)
    out = query.new_zeros(len(query), query.shape[2], query.shape[1], step.value.shape[-1])
    for part in step.past:
        part.attend(query, step, mask.expand(len(query), -1, -1, -1), options, out)
    return out


@dataclass(frozen=True, eq=False)
class _Alike:
    """Sequences of a step whose rows hold the same slots, and what the rows held before it.

    Attributes:
        group: Which they are, and which of the step's tokens are real.
        slots: The slot of each position, the step's real tokens last.
        kept: What each kind of head keeps.
    """

    group: Group
    slots: Int[Tensor, " positions"]
    kept: list[Kept]

    def attend(self, query: Query, step: Step, mask: Explicit, options: dict[str, Any], out: Output) -> None:
        """Attends the queries of these sequences, and writes to `out`."""
        where, heads, s_aux = self.group.sequences, step.key.shape[1], options["s_aux"]
        new = step.start + torch.arange(step.tokens, device=query.device)
        new = new if self.group.real is None else new[self.group.real]
        past, first = len(self.slots) - len(new), step.start + step.tokens - query.shape[2]
        asked = (new >= first).nonzero()[:, 0]
        rows = new[asked] - first
        grouped = query[where].index_select(2, rows).unflatten(1, (heads, -1))
        shown = mask[where].index_select(2, rows).expand(-1, query.shape[1], -1, -1).unflatten(1, (heads, -1))
        attended = out.new_empty(len(grouped), len(rows), heads, grouped.shape[2], out.shape[-1])
        for rules, members, held, keys, values in self.kept:
            positions = torch.cat([held, past + torch.arange(len(new), device=query.device)])
            seen = rules.take((0,)).visible(past + asked[None], positions[None], causal=False)
            part = shown[:, members].flatten(1, 2)[..., self.slots[positions]]
            part = part & seen if part.dtype == torch.bool else part.masked_fill(~seen, -torch.inf)
            key, value = (
                torch.cat([before, self.group.take(x)[:, members]], 2)
                for before, x in ((keys, step.key), (values, step.value))
            )
            found, lse = attend(
                grouped[:, members].flatten(1, 2), key, value,
                scale=options["scale"], mask=part, softcap=options["softcap"],
            )  # fmt: skip
            if s_aux is not None:
                found = add_sink_logit(found, lse, s_aux.unflatten(0, (heads, -1))[list(members)].flatten())
            attended[:, :, members] = found.unflatten(1, (len(members), -1)).permute(0, 3, 1, 2, 4)
        out[where, rows] = attended.flatten(2, 3)


def _alike(step: Step, real: Bool[Tensor, "batch tokens"] | None) -> Iterator[_Alike]:
    """Reads the past, before the step overwrites it: of all sequences at once where none has padding."""
    storage, device = step.storage, step.key.device
    if real is None and not storage.history.padded:
        group, slots = Group(slice(0, storage.rows.batch), None), torch.arange(step.start + step.tokens, device=device)
        yield _Alike(group, slots, storage.past(group.sequences, step.start))
        return
    for b, length in enumerate(storage.rows.lengths.tolist()):
        new = torch.arange(step.tokens, device=device) if real is None else real[b].nonzero()[:, 0]
        if len(new):
            slots = torch.cat([storage.history.real_slots(b).to(device), step.start + new])
            yield _Alike(Group(slice(b, b + 1), new), slots, storage.past(slice(b, b + 1), length))


def _real(mask: Explicit, step: Step) -> Bool[Tensor, "batch tokens"] | None:
    """Which new tokens some query sees, `None` if all; kept, so that the layers of a forward pass ask once."""
    found = getattr(mask, "_redknot_real", None)
    if found is None or found[0] != (step.start, step.tokens):
        shown = _shown(mask[..., step.start : step.start + step.tokens])
        real = shown.diagonal(dim1=2, dim2=3).any(1)  # as a rule a token sees itself
        if not bool(real.all()):
            real = shown.any(2).any(1)
        real = None if bool(real.all()) else real.expand(len(step.key), -1)
        found = mask._redknot_real = ((step.start, step.tokens), real)  # pyright: ignore
    return found[1]


def _shown(mask: Tensor) -> Bool[Tensor, "..."]:
    return mask if mask.dtype == torch.bool else mask > _HIDDEN


def _check_past(mask: Explicit, step: Step) -> None:
    """Raises where a mask shows what was skipped as padding when it was new."""
    if not step.storage.history.padded:
        return
    for b in range(len(step.key)):
        skipped = np.setdiff1d(np.arange(step.start), step.storage.history.real_slots(b).cpu().numpy())
        columns = mask[min(b, len(mask) - 1)][..., torch.from_numpy(skipped).to(mask.device)]
        shown = torch.nonzero(_shown(columns).any(0).any(0))
        if len(shown):
            raise ValueError(
                f"a 4-D attention mask over a cache that skipped padding shows slot {skipped[int(shown[0])]} of "
                f"sequence {b}: no query saw it when it was new, so it is not stored. Pass the 2-D mask, hide what "
                "was padding, or start a new cache."
            )


def _check(mask: Tensor, query: Query, step: Step) -> None:
    batch, heads, tokens, _ = query.shape
    slots = step.start + step.tokens
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    fits = fits and mask.shape[2] == tokens and mask.shape[3] >= slots
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"the attention mask is {list(mask.shape)} of {mask.dtype}: give [{batch}, 1, {tokens}, {slots}] of bool "
            "(True is visible) or of float (added to the scores), or the 2-D mask"
        )
