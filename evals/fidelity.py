"""How near a method comes to the dense cache, token by token of the dense answer, and whether an answer is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """A method against the dense cache, both given the question and the dense answer.

    Attributes:
        tokens: Tokens of the dense answer.
        top1: How many of them the method would have chosen too.
        top10: Mean share of the ten likeliest words that both have in common.
        kl: Of each token KL(dense || method), in nats.
        nll: Negative log-likelihood of the dense answer under the method, summed, in nats.
        dense_nll: The same under the dense cache.
        first_divergence: The first token that the method would have chosen otherwise.
    """

    tokens: int
    top1: int
    top10: float
    kl: list[float]
    nll: float
    dense_nll: float
    first_divergence: int | None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it, the numbers rounded to what matters."""
        fields = asdict(self)
        fields["kl"] = [float(f"{x:.4g}") for x in self.kl]
        return fields | {name: float(f"{fields[name]:.6g}") for name in ("top10", "nll", "dense_nll")}


def fidelity(dense: Tensor, method: Tensor, answer: Sequence[int]) -> Fidelity:
    """Compare logits `[tokens, words]` of the dense cache and of a method over the dense answer."""
    log_p, log_q = dense.log_softmax(-1), method.to(dense.device).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = log_p.argmax(-1) == log_q.argmax(-1)
    k = min(10, log_p.shape[-1])
    best, ours = log_p.topk(k).indices, log_q.topk(k).indices
    shared = (best[:, :, None] == ours[:, None, :]).any(-1).float().mean()
    tokens = torch.tensor(list(answer), device=dense.device)[:, None]
    missed = (~same).nonzero()
    return Fidelity(
        tokens=len(answer),
        top1=int(same.sum()),
        top10=float(shared),
        kl=kl.tolist(),
        nll=-float(log_q.gather(1, tokens).sum()),
        dense_nll=-float(log_p.gather(1, tokens).sum()),
        first_divergence=int(missed[0]) if len(missed) else None,
    )


def audit_gap(logits: Tensor, answer: Sequence[int]) -> float:
    """Return by how much an answer's worst token falls short of the best word, in standard deviations of the logits.

    An answer that was decoded greedily from the cache that gave these logits has a gap at the level of rounding.

    Args:
        logits: From the method's cache, given the question and the answer in one step, `[tokens, words]`.
        answer: Tokens that the method is said to have answered with.
    """
    tokens = torch.tensor(list(answer), device=logits.device)[:, None]
    short = logits.amax(-1) - logits.gather(1, tokens)[:, 0]
    return float((short / logits.std(-1)).max())


def allowed_gap(dtype: torch.dtype) -> float:
    """Return the gap that rounding explains: the root of the dtype's precision (3e-4 in float32, 0.09 in bfloat16)."""
    return torch.finfo(dtype).eps ** 0.5
