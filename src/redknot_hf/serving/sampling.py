"""Choosing tokens for many requests at once, each in its own way, on the device.

The steps are those of `generate`, in its order: bias, penalties, processors, temperature, top-k, top-p, min-p, draw.
So a request with a seed draws what `torch.manual_seed(seed)` and `generate` draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .request import Sampling

Logits = Float[Tensor, "requests words"]
Chosen = Int[Tensor, " requests"]


class Said:
    """What the model says of the next tokens of some sequences.

    Args:
        logits: Of the sequences, or of more.
        at: Which of them are those of the sequences, in order; `None` where all are.
        likeliest: The tokens of the largest logits, if they are known.
    """

    def __init__(
        self,
        logits: Float[Tensor, "rows words"],
        at: Int[Tensor, " sequences"] | None = None,
        likeliest: Int[Tensor, " sequences"] | None = None,
    ) -> None:
        self.device = logits.device
        self._rows, self._at, self._likeliest = logits, at, likeliest

    @cached_property
    def logits(self) -> Float[Tensor, "sequences words"]:
        """Of the sequences."""
        return self._rows if self._at is None else self._rows.index_select(0, self._at)

    @cached_property
    def likeliest(self) -> Int[Tensor, " sequences"]:
        """The tokens of the largest logits."""
        return self.logits.argmax(-1) if self._likeliest is None else self._likeliest


class Chooser:
    """How one request chooses, and what it has seen.

    Args:
        sampling: What was asked.
        prompt: Ids.
        device: Of the logits.
        answered: Ids that were chosen before, elsewhere: they are seen, and drawn.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], device: torch.device, answered: Sequence[int] = ()
    ) -> None:
        self.sampling, self.device = sampling, device
        self.generator: torch.Generator | None = None
        if sampling.seed is not None and sampling.temperature > 0:
            self.generator = torch.Generator(device).manual_seed(sampling.seed)
        self._prompt, self._answered = prompt, answered
        self._drawn = 0 if self.generator is None else len(answered)
        self._ids: Int[Tensor, " seen"] | None = None
        self._counts: Int[Tensor, " words"] | None = None  # of the answer
        self._seen: Bool[Tensor, " words"] | None = None  # of prompt and answer

    def shape(self, logits: Float[Tensor, "1 words"]) -> Float[Tensor, "1 words"]:
        """Logits under bias, penalties and processors."""
        asked = self.sampling
        if self._ids is None:
            self._begin(logits.shape[-1])
        assert self._ids is not None
        assert self._counts is not None
        assert self._seen is not None
        if asked.logit_bias:
            at = torch.tensor(list(asked.logit_bias), device=self.device)
            more = torch.tensor(list(asked.logit_bias.values()), device=self.device, dtype=logits.dtype)
            logits = logits.index_add(1, at, more[None])
        if asked.repetition_penalty != 1:
            less = torch.where(logits < 0, logits * asked.repetition_penalty, logits / asked.repetition_penalty)
            logits = torch.where(self._seen, less, logits)
        if asked.presence_penalty or asked.frequency_penalty:
            taken = asked.presence_penalty * (self._counts > 0) + asked.frequency_penalty * self._counts
            logits = logits - taken.to(logits.dtype)
        for processor in asked.processors:
            logits = processor(self._ids[None], logits)
        return logits

    def saw(self, token: Int[Tensor, " 1"]) -> None:
        """Counts a token of the answer."""
        if self._ids is not None and self._counts is not None and self._seen is not None:
            self._ids = torch.cat([self._ids, token])
            self._counts.index_add_(0, token, torch.ones_like(token))
            self._seen.index_fill_(0, token, True)

    def _begin(self, words: int) -> None:
        self._ids = torch.tensor(self._prompt, device=self.device)
        self._counts = torch.zeros(words, dtype=torch.long, device=self.device)
        self._seen = torch.zeros(words, dtype=torch.bool, device=self.device)
        self._seen[self._ids] = True
        for token in self._answered:
            self.saw(torch.tensor([token], device=self.device))

    def draw(self, shares: Float[Tensor, "1 words"]) -> Int[Tensor, " 1"]:
        """Draws by the request's own seed; what a draw takes of the generator depends on the number of words alone."""
        for _ in range(self._drawn):
            torch.multinomial(torch.ones_like(shares), 1, generator=self.generator)
        self._drawn = 0
        return torch.multinomial(shares, 1, generator=self.generator)[0]


class Refusals(Exception):  # noqa: N818 - it carries others
    """Some requests could not choose.

    Attributes:
        errors: By their index.
        scores: What the others choose from, in their order: `settle` takes it, since a processor that counts its calls
            must not be called again.
    """

    def __init__(self, errors: dict[int, Exception], scores: Logits) -> None:
        super().__init__(f"{len(errors)} requests could not choose a token")
        self.errors, self.scores = errors, scores


def choose(logits: Logits, choosers: Sequence[Chooser]) -> Chosen:
    """A token for each request; the device does all of it.

    Raises:
        Refusals: A request's own processors raised, or drew from nothing; no request has chosen then.
    """
    if all(chooser.sampling.plain for chooser in choosers):
        return logits.argmax(-1)
    scores = logits.float()
    errors: dict[int, Exception] = {}
    rows = list(scores.split(1))
    for i, chooser in enumerate(choosers):
        if chooser.sampling.shaped:
            try:
                rows[i] = _checked(chooser.shape(rows[i].clone()), scores)
            except Exception as e:  # a request's own code
                errors[i] = e
    if errors:
        kept = [row for i, row in enumerate(rows) if i not in errors]
        raise Refusals(errors, torch.cat([scores[:0], *kept]))
    return settle(torch.cat(rows), choosers)


def settle(scores: Logits, choosers: Sequence[Chooser]) -> Chosen:
    """A token for each request, from logits that are under its bias, penalties and processors already."""
    chosen = scores.argmax(-1)
    drawing = [i for i, chooser in enumerate(choosers) if chooser.sampling.temperature > 0]
    if drawing:
        at = torch.tensor(drawing, device=scores.device)
        asked = [choosers[i] for i in drawing]
        warped = warp(scores.index_select(0, at), [chooser.sampling for chooser in asked])
        chosen = chosen.index_copy(0, at, _draw(_shares(warped, scores.index_select(0, at)), asked))
    for i, chooser in enumerate(choosers):
        if chooser.sampling.shaped:
            chooser.saw(chosen[i : i + 1])
    return chosen


def warp(scores: Logits, asked: Sequence[Sampling]) -> Logits:
    """Logits under temperature, top-k, top-p and min-p, row by row as `generate` has them."""
    column = lambda name: torch.tensor([getattr(x, name) for x in asked], device=scores.device)[:, None]  # noqa: E731
    scores = scores / column("temperature").to(scores.dtype)
    words = scores.shape[-1]
    if any(0 < x.top_k < words for x in asked):
        ordered = scores.sort(-1, descending=True).values
        last = torch.tensor([min(x.top_k or words, words) - 1 for x in asked], device=scores.device)[:, None]
        scores = scores.masked_fill(scores < ordered.gather(1, last), -torch.inf)
    if any(x.top_p < 1 for x in asked):
        ordered, order = scores.sort(-1, descending=False)
        gone = ordered.softmax(-1).cumsum(-1) <= 1 - column("top_p")
        gone[:, -1] = False
        gone &= column("top_p") < 1
        scores = scores.masked_fill(gone.scatter(1, order, gone), -torch.inf)
    if any(x.min_p > 0 for x in asked):
        shares = scores.softmax(-1)
        scores = scores.masked_fill(shares < column("min_p") * shares.amax(-1, keepdim=True), -torch.inf)
    return scores


def log_probabilities(
    logits: Logits, chosen: Chosen, most: int
) -> tuple[Float[Tensor, " requests"], Float[Tensor, "requests top"], Int[Tensor, "requests top"]]:
    """Of the chosen tokens, and of so many of the likeliest ones, with their ids."""
    all_of = logits.float().log_softmax(-1)
    values, ids = all_of.topk(most, -1)
    return all_of.gather(1, chosen[:, None])[:, 0], values, ids


def _shares(warped: Logits, scores: Logits) -> Logits:
    """What each token is drawn by. Where a temperature next to 0 overflows, the likeliest one has all, as at 0.

    To draw from NaN raises, or ends the device's context: one request's numbers would end all others.
    """
    shares = warped.softmax(-1)
    likeliest = torch.zeros_like(shares).scatter(1, scores.argmax(-1, keepdim=True), 1)
    return torch.where(shares.isnan().any(-1, keepdim=True), likeliest, shares)


def _draw(shares: Logits, choosers: Sequence[Chooser]) -> Chosen:
    chosen = torch.empty(len(shares), dtype=torch.long, device=shares.device)
    own = [i for i, chooser in enumerate(choosers) if chooser.generator is not None]
    free = [i for i, chooser in enumerate(choosers) if chooser.generator is None]
    if free:
        at = torch.tensor(free, device=shares.device)
        chosen.index_copy_(0, at, torch.multinomial(shares.index_select(0, at), 1)[:, 0])
    for i in own:  # as each would draw alone
        chosen[i : i + 1] = choosers[i].draw(shares[i : i + 1])
    return chosen


def _checked(scores: Any, like: Logits) -> Float[Tensor, "1 words"]:
    if not isinstance(scores, Tensor) or scores.shape != (1, like.shape[1]):
        raise ValueError(f"a logits processor returned {type(scores).__name__}: return scores of shape (1, words)")
    if scores.device.type == "cpu" and bool(scores.isneginf().all() | scores.isnan().any()):
        raise ValueError("a logits processor leaves no token to choose from, or made NaN")
    return scores.to(like.dtype)
