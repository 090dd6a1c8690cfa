"""How many held-out answers a network gets right, by length and by kind of question, dense and under its plan."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from evals.tiny.corpus import Corpus, Exam
from evals.tiny.facts import Family
from evals.tiny.lexicon import Lexicon
from evals.tiny.network import Network

Part = Literal["plain", "dependent"]

# Seeds of held-out texts begin with a word of their own, so that no training text is among them.
HELD_OUT = 1_000_003
# Questions a text, by its length: about what `Corpus.sample` was always asked.
QUESTIONS = {256: 4, 1024: 14, 2048: 24, 4096: 40, 8192: 48}
# More need more cities than the language has.
MOST_QUESTIONS = 120


@dataclass(slots=True)
class Score:
    """Right answers of one kind: whole ones, and their tokens, each predicted from the true tokens before it."""

    answers: int = 0
    right: int = 0
    tokens: int = 0
    right_tokens: int = 0

    def add(self, hits: np.ndarray) -> None:
        """Count one answer, whose tokens are right or not."""
        self.answers += 1
        self.right += int(hits.all())
        self.tokens += len(hits)
        self.right_tokens += int(hits.sum())

    def __add__(self, other: "Score") -> "Score":
        return Score(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @property
    def accuracy(self) -> float:
        """Share of answer tokens that are right."""
        return self.right_tokens / self.tokens

    @property
    def exact(self) -> float:
        """Share of answers that are right from the first token to the last, as greedy decoding would give them."""
        return self.right / self.answers


def set_exams(length: int, part: Part, n_answers: int, seed: int) -> list[Exam]:
    """Return held-out texts of this length with at least `n_answers` answers; the seed decides them."""
    corpus = Corpus(Lexicon(), seed=(HELD_OUT, seed, length, part == "dependent"))
    third = max(1, QUESTIONS.get(length, min(MOST_QUESTIONS, length // 80)) // 3)
    families: tuple[Family, ...] = (
        ("code", "person", "variable") if part == "plain" else ("nickname", "companion", "total")
    )
    exams: list[Exam] = []
    answers = 0
    while answers < n_answers:
        exams.append(corpus.exam(length, dict.fromkeys(families, third)))
        answers += len(exams[-1].answers)
    return exams


@torch.no_grad()  # not inference_mode: training uses the masks and angles that the network keeps
def grade(network: Network, exams: Iterable[Exam], planned: bool, tokens: int = 65536) -> dict[str, Score]:
    """Return the score of each kind over exams of one length, `tokens` at a time."""
    exams = list(exams)
    device = next(network.model.parameters()).device
    rows = max(1, tokens // len(exams[0].ids))
    scores: dict[str, Score] = {}
    for i in range(0, len(exams), rows):
        batch = exams[i : i + rows]
        ids = np.stack([exam.ids for exam in batch])
        logits = network.logits(torch.from_numpy(ids).to(device), planned, compiled=False)
        predicted = logits.argmax(-1).cpu().numpy()
        for exam, row in zip(batch, predicted, strict=True):
            for kind, start, stop in exam.answers:
                scores.setdefault(kind, Score()).add(row[start - 1 : stop - 1] == exam.ids[start:stop])
    return scores


def total(scores: Iterable[Score]) -> Score:
    """Return the sum of scores."""
    return sum(scores, Score())


def evaluate(network: Network, lengths: Iterable[int], n_answers: int, seed: int, plain: bool) -> dict[str, dict]:
    """Return `{length: {part: {"dense" | "plan": {kind: figures}}}}` over `n_answers` held-out answers and more each.

    Kind "all" holds all of a part's kinds. A plainly trained network (`plain`) is evaluated dense only.
    """
    result: dict[str, dict] = {}
    for length in lengths:
        parts = result[str(length)] = {}
        for part in ("plain", "dependent"):
            exams = set_exams(length, part, n_answers, seed)
            modes = {"dense": False} if plain else {"dense": False, "plan": True}
            parts[part] = {mode: _figures(grade(network, exams, planned)) for mode, planned in modes.items()}
    return result


def _figures(scores: dict[str, Score]) -> dict[str, dict]:
    scores = dict(sorted(scores.items())) | {"all": total(scores.values())}
    return {
        kind: {
            "answers": score.answers,
            "tokens": score.tokens,
            "accuracy": round(score.accuracy, 4),
            "exact": round(score.exact, 4),
        }
        for kind, score in scores.items()
    }
