"""What the bundled model is taught, and when: lengths, kinds of facts, and words to repeat."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from evals.tiny.corpus import PADDING, Corpus
from evals.tiny.facts import FACT_TOKENS, QUESTION_TOKENS, Family
from evals.tiny.lexicon import Lexicon

# What the words weigh in a text of random words, which cannot be guessed, and where they come again, which can.
RANDOM, REPEATED = 0.02, 1.0

FAMILIES: tuple[Family, ...] = ("code", "person", "variable", "nickname", "companion", "total")
# How often each is drawn. What must be understood where it is read is learned last, so it comes most.
FREQUENCY = (0.08, 0.2, 0.1, 0.25, 0.25, 0.12)
# At most so many of a family in a text, so that the names, cities and variables of the language suffice for all.
MOST = (60, 50, 60, 35, 35, 60)
MOST_FACTS = 120
# How often a training text tells what a word stands for that only earlier documents explain.
TOLD = 0.5


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training.

    Attributes:
        share: Of the whole curriculum.
        lengths: Lengths of the texts, and the share of steps each takes.
        repeats: Share of the texts of up to 256 tokens that are random words and then the same words again.
    """

    share: float
    lengths: dict[int, float]
    repeats: float


# Nothing is ever retrieved if training begins at 512 tokens. Induction heads form at 128, lookups at 256, and
# then reach further and further. The short texts stay, since they hold most answers a token.
CURRICULUM = (
    Stage(0.10, {128: 1.0}, 1 / 3),
    Stage(0.38, {128: 0.2, 256: 0.8}, 1 / 4),
    Stage(0.20, {256: 0.4, 1024: 0.6}, 1 / 8),
    Stage(0.18, {256: 0.25, 1024: 0.3, 4096: 0.45}, 1 / 16),
    Stage(0.14, {256: 0.15, 1024: 0.15, 4096: 0.3, 8192: 0.4}, 1 / 16),
)


@dataclass(frozen=True, slots=True)
class Order:
    """A step's texts: everything that decides them, beside the seed."""

    step: int
    length: int
    repeats: float


def order(step: int, progress: float, max_length: int, seed: int) -> Order:
    """Return what a step is to learn from when this share (0 to 1) of the curriculum is over."""
    shares = np.cumsum([stage.share for stage in CURRICULUM])
    stage = CURRICULUM[min(int(np.searchsorted(shares, progress, side="right")), len(CURRICULUM) - 1)]
    lengths = {length: share for length, share in stage.lengths.items() if length <= max_length}
    lengths = lengths or {max_length: 1.0}
    chances = np.array(list(lengths.values())) / sum(lengths.values())
    length = int(np.random.default_rng((seed, step, 1)).choice(list(lengths), p=chances))
    return Order(step, length, stage.repeats if length <= 256 else 0.0)


class Lessons(Dataset):
    """Makes the texts of a step: ids `[rows, length]` of int16 and weights alike of float16.

    Args:
        tokens: Tokens of a step.
        seed: Together with an order it decides the texts.
    """

    def __init__(self, tokens: int, seed: int) -> None:
        self.lexicon, self.tokens, self.seed = Lexicon(), tokens, seed

    def __getitem__(self, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.tokens // order.length
        corpus = Corpus(self.lexicon, seed=(self.seed, order.step, 0), told=TOLD)
        ids = np.zeros((rows, order.length), dtype=np.int16)
        weights = np.zeros((rows, order.length), dtype=np.float16)
        repeated = round(order.repeats * rows)
        for row in range(rows):
            if row < repeated:
                ids[row], weights[row] = _repeated(corpus, order.length)
            else:
                exam = corpus.exam(order.length, draw_counts(corpus.rng, order.length))
                ids[row], weights[row] = exam.ids, exam.weights
        return torch.from_numpy(ids), torch.from_numpy(weights)


class Orders(Sampler[Order]):
    """Endless orders from a step on; `progress` tells the place in the curriculum (0 to 1) at a step."""

    def __init__(self, first: int, progress: Callable[[int], float], max_length: int, seed: int) -> None:
        self.first, self.progress, self.max_length, self.seed = first, progress, max_length, seed

    def __iter__(self) -> Iterator[Order]:
        step = self.first
        while True:
            yield order(step, self.progress(step), self.max_length, self.seed)
            step += 1


def load(lessons: Lessons, orders: Orders, workers: int, pin: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return an endless stream of steps' texts, made by worker processes ahead of time."""
    ahead = 4 if workers else None
    loader = DataLoader(
        lessons, sampler=orders, batch_size=None, num_workers=workers, prefetch_factor=ahead, pin_memory=pin
    )
    return iter(loader)


def draw_counts(rng: np.random.Generator, length: int) -> dict[Family, int]:
    """Return how many facts of each family to ask for in a text of `length` tokens, so that all fit.

    Two texts in five have one family only, many keys that are alike. Short texts are full of facts, long ones less.
    """
    share = rng.uniform(0.6, 1.0) if length <= 256 else rng.uniform(0.1, 0.8)
    budget = (length - 24) * share
    if rng.random() < 0.4:
        drawn = np.full(MOST_FACTS, rng.choice(len(FAMILIES), p=FREQUENCY))
    else:
        drawn = rng.choice(len(FAMILIES), MOST_FACTS, p=FREQUENCY)
    cost = np.array([FACT_TOKENS[family] + QUESTION_TOKENS[family] for family in FAMILIES])
    fitting = max(1, int(np.searchsorted(np.cumsum(cost[drawn]), budget, side="right")))
    counts = np.minimum(np.bincount(drawn[:fitting], minlength=len(FAMILIES)), MOST)
    return {family: int(n) for family, n in zip(FAMILIES, counts, strict=True) if n}


def _repeated(corpus: Corpus, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random words over a quarter to a half of the length, and the same words again until its end."""
    period = int(corpus.rng.integers(length // 4, length // 2 + 1))
    words = corpus.rng.integers(5, len(corpus.lexicon.words), size=period)
    words[0] = corpus.lexicon.id["<bos>"]
    ids = np.resize(words, length)
    weights = np.where(np.arange(length) < period, RANDOM, REPEATED)
    weights[period] = PADDING  # that the words begin again cannot be guessed
    return ids, weights
