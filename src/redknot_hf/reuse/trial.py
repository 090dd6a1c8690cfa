"""What reuse of documents costs a model in its predictions, by how much is recomputed: tried on the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redknot_hf.attention.devices import input_device
from redknot_hf.cache.argument import cache_argument
from redknot_hf.cache.cache import RedKnotCache
from redknot_hf.plan.plan import HeadPlan

from .assemble import assemble
from .stand_in import StandIn
from .store import SegmentStore

SHARES = (0.0, 0.05, 0.15, 0.3)
# Tokens that all documents of a context stand behind.
_OPENING = 16


@dataclass(frozen=True, eq=False)
class Context:
    """A text in documents, and what is asked behind them.

    Attributes:
        opening: Token ids that all documents stand behind.
        documents: Ids of each.
        asked: Ids of questions with their answers.
        answers: Which of these the model should predict; never the first.
    """

    opening: Sequence[int]
    documents: Sequence[Sequence[int]]
    asked: Sequence[int]
    answers: Bool[Tensor, " asked"]

    @property
    def question(self) -> list[int]:
        """What is asked, without the answers."""
        return [token for token, given in zip(self.asked, self.answers.tolist(), strict=True) if not given]

    @staticmethod
    def of(ids: Int[Tensor, " tokens"], targets: Int[Tensor, " targets"], documents: int = 8) -> Context:
        """Cuts a text with questions at its end into documents of like length.

        Args:
            ids: The text.
            targets: Places of the answers' tokens, in order.
            documents: How many.

        Raises:
            ValueError: The text before the questions is too short for so many documents.
        """
        gaps = [b - a for a, b in pairwise(targets.tolist()) if b - a > 1]
        end = max(0, int(targets[0]) - max(gaps, default=1))  # the first question is about as long as the others
        size = (end - _OPENING) // documents
        if size < 1:
            raise ValueError(f"{end} tokens stand before the questions: give {documents} documents more of them")
        cuts = [*range(_OPENING, _OPENING + documents * size, size), end]
        text, answers = ids.tolist(), torch.zeros(len(ids), dtype=torch.bool).index_fill(0, targets, True)
        return Context(text[:_OPENING], [text[a:b] for a, b in pairwise(cuts)], text[end:], answers[end:])


@dataclass(frozen=True)
class Cost:
    """What reuse costs where so much is recomputed.

    Attributes:
        share: Of the tokens, asked for; what shares no words with the question is not recomputed.
        recomputed: Of the tokens, done.
        kl: Of the predictions of reading everything against those of reuse, nats an answer's token.
        agreement: Share of the answers' tokens whose likeliest token stays.
    """

    share: int | float
    recomputed: float
    kl: float
    agreement: float

    def __str__(self) -> str:
        return f"{self.recomputed:.0%} recomputed: KL {self.kl:.4f}, {self.agreement:.1%} as reading everything"


@torch.no_grad()
def reuse_costs(
    model: Any, plan: HeadPlan, contexts: Sequence[Context], shares: Sequence[int | float] = SHARES
) -> list[Cost]:
    """Holds stored documents, put together for a question, against reading all of them under the same plan.

    Documents are stored behind a stand-in made of all contexts' documents.

    Args:
        model: Runs with `attn_implementation="redknot"`.
        plan: What heads see.
        contexts: Of documents and questions.
        shares: How much is recomputed for the question.

    Raises:
        ValueError: The model cannot be served, or its stored keys cannot be reused.
    """
    every = [document for context in contexts for document in context.documents]
    store = SegmentStore(model, plan, keep="full", stand_in=StandIn.of(every), identity="tried")
    found: dict[int | float, list[tuple[float, Float[Tensor, " answers"], Bool[Tensor, " answers"]]]] = {}
    for context in contexts:
        whole = [*context.opening, *(token for document in context.documents for token in document)]
        wanted = _predicted(model, RedKnotCache(model.config, plan), context, whole)
        refs = [store.add(context.opening), *store.add_all(context.documents, context.opening)]
        for share in shares:
            cache = assemble(model, refs, question=context.question, share=share)
            mine = _predicted(model, cache, context)
            kl = (wanted.exp() * (wanted - mine)).sum(-1).clamp(min=0)
            done = cache.recomputed_tokens / len(whole)
            found.setdefault(share, []).append((done, kl, wanted.argmax(-1) == mine.argmax(-1)))
    return [
        Cost(
            share,
            sum(done for done, _, _ in rows) / len(rows),
            torch.cat([kl for _, kl, _ in rows]).mean().item(),
            torch.cat([same for _, _, same in rows]).float().mean().item(),
        )
        for share, rows in found.items()
    ]


def least(costs: Sequence[Cost], max_kl: float) -> tuple[Cost | None, str]:
    """The cheapest that stays within a KL, if one does, and a sentence about it."""
    enough = next((cost for cost in costs if cost.kl <= max_kl), None)
    said = "none of these shares" if enough is None else f"share={enough.share:g} with a stand-in and the question"
    return enough, f"{said} keeps reuse within KL {max_kl:g} of reading everything"


def _predicted(
    model: Any, cache: RedKnotCache, context: Context, before: Sequence[int] = ()
) -> Float[Tensor, "answers vocabulary"]:
    """Log-probabilities of the answers' tokens, after what the cache holds and what is read before them."""
    ids = torch.tensor([[*before, *context.asked]], device=input_device(model))
    logits = model(input_ids=ids, logits_to_keep=len(context.asked), **cache_argument(model, cache)).logits[0]
    places = torch.nonzero(context.answers)[:, 0] - 1
    return logits[places.to(logits.device)].float().log_softmax(-1).cpu()
