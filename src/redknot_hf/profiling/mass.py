"""Attention mass, the criterion of the RedKnot paper (arXiv 2606.06256, section 3.2), for comparison.

It looks at where attention goes and not at what is lost when it cannot go there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from redknot_hf.attention.devices import input_device
from redknot_hf.attention.watching import Attended, Call, read_whole, watching
from redknot_hf.plan.plan import HeadSpec

from .prompt import Prompt, evenly

_ROWS = 64  # queries of a prompt whose weights are looked at
_SINKS = 4  # tokens that attention falls back on where a text begins


def measure_mass(
    model: PreTrainedModel, prompts: Sequence[Prompt], windows: Sequence[int], sink: int, tick: Callable[[], object]
) -> Float[np.ndarray, "prompts heads windows"]:
    """Measures each prompt: the greater of edge mass and prefix shift of every head at every window.

    Edge mass is the mean share of a query's attention outside of sink and window. Prefix shift is 1 - cosine between
    the attention among the tokens of the prompt's second half, read behind the first half and read alone. Its first
    tokens are left out of that: read alone they become an attention sink, which they are not behind the first half,
    and which would decide for most heads of a pretrained model. Both are taken at up to 64 queries, and of a group of
    query heads the greatest counts.
    """
    found = []
    for prompt in prompts:
        ids = prompt.ids[None].to(input_device(model))
        half = len(prompt) // 2
        rows = (evenly(prompt.targets, _ROWS) - 1).to(input_device(model))
        late = evenly(torch.arange(half, len(prompt)), _ROWS).to(input_device(model))
        whole, alone = _Watcher(rows, late, half, windows, sink), _Watcher(rows[:0], late - half, 0, (), sink)
        with torch.no_grad():
            for watcher, read in ((whole, ids), (alone, ids[:, half:])):
                with watching(model, watcher):
                    read_whole(model, read)
        layers = []
        for layer in sorted(whole.among):
            behind, by_itself = (watcher.among[layer][..., _SINKS:].flatten(1) for watcher in (whole, alone))
            shift = 1 - torch.cosine_similarity(behind, by_itself)
            layers.append(torch.maximum(whole.outside[layer], shift[:, None]).unflatten(0, (whole.heads[layer], -1)))
        found.append(torch.cat([layer.amax(1) for layer in layers]).double().cpu().numpy())
        tick()
    return np.stack(found)


class _Watcher:
    """Keeps what a forward pass attends to.

    Args:
        rows: Queries whose mass outside of the windows is summed.
        late: Queries whose attention from position `start` on is kept.
    """

    def __init__(
        self,
        rows: Int[Tensor, " rows"],
        late: Int[Tensor, " late"],
        start: int,
        windows: Sequence[int],
        sink: int,
    ) -> None:
        self.rows, self.late, self.start, self.windows, self.sink = rows, late, start, windows, sink
        self.outside: dict[int, Float[Tensor, "query_heads windows"]] = {}
        self.among: dict[int, Float[Tensor, "query_heads late keys"]] = {}
        self.heads: dict[int, int] = {}

    def __call__(self, call: Call) -> Attended:
        self.heads[call.layer] = call.heads
        weights = _weights(call, self.rows)
        keys = torch.arange(weights.shape[-1], device=weights.device)
        outside = [
            (weights * ((keys <= self.rows[:, None] - window) & (keys >= self.sink))).sum(-1).mean(-1)
            for window in self.windows
        ]
        if outside:
            self.outside[call.layer] = torch.stack(outside, -1)
        self.among[call.layer] = _weights(call, self.late)[..., self.start :]
        return call.attend((HeadSpec(),) * call.heads)


def _weights(call: Call, rows: Int[Tensor, " rows"]) -> Float[Tensor, "query_heads rows keys"]:
    """Attention of some queries, in float32."""
    query = call.query[0, :, rows].unflatten(0, (call.heads, -1)).float()
    scores = (query @ call.key[0].float().transpose(-1, -2)[:, None]).flatten(0, 1) * call.options["scale"]
    if (cap := call.options["softcap"]) is not None:
        scores = cap * torch.tanh(scores / cap)
    keys = torch.arange(scores.shape[-1], device=scores.device)
    hidden = keys > rows[:, None]
    if call.reach is not None:
        hidden |= keys <= rows[:, None] - call.reach
    scores = scores.masked_fill(hidden, -torch.inf)
    if (s_aux := call.options["s_aux"]) is not None:
        scores = torch.cat([scores, s_aux[:, None, None].float().expand(-1, len(rows), 1)], -1)
    return scores.softmax(-1)[..., : len(keys)]
