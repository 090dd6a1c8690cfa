"""Texts in the bundled model's language: documents of filler and facts, and questions about the facts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from evals.tiny.facts import (
    KINDS,
    QUESTION_TOKENS,
    FactMaker,
    Facts,
    Family,
    Kind,
    Question,
    counts_for,
    least_documents,
    plain_counts,
)
from evals.tiny.lexicon import Lexicon

# What a token's loss weighs in training: what can only be guessed, what is to be learned, what is nothing.
TEXT, ANSWER, PADDING = 0.1, 1.0, 0.0


@dataclass(frozen=True, slots=True)
class Collection:
    """A context of documents, and questions that each may be asked right after it."""

    context: list[int]
    questions: list[Question]


@dataclass(frozen=True, slots=True)
class Exam:
    """A text with questions and answers at its end, and a mark for every answer.

    Attributes:
        ids: The tokens.
        weights: What each token's loss weighs in training.
        answers: Per question its kind and the place of its answer: `ids[start:stop]`, the last token is the full stop.
    """

    ids: np.ndarray
    weights: np.ndarray
    answers: list[tuple[Kind, int, int]]


class Corpus:
    """An endless source of texts; the seed decides them all.

    Args:
        lexicon: The words.
        seed: Decides the texts.
        told: How often a word that only earlier documents explain is followed by what it stands for. Only training
            texts tell anything.
    """

    def __init__(self, lexicon: Lexicon, seed: int | Sequence[int], told: float = 0.0) -> None:
        self.lexicon = lexicon
        self.rng = np.random.default_rng(seed)
        self.facts = FactMaker(lexicon, self.rng, told)

    def sample(self, length: int, n_questions: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `length` tokens, documents with questions and answers at the end, and each token's loss weight."""
        exam = self.exam(length, plain_counts(n_questions), reserve=18 * n_questions)
        return exam.ids, exam.weights

    def exam(self, length: int, counts: Mapping[Family, int], reserve: int | None = None) -> Exam:
        """Return a text of `length` tokens that asks one question about each of its facts.

        Args:
            length: Tokens of the text. What does not fit is cut off its end.
            counts: Facts to ask for, by family.
            reserve: Tokens to leave free for the questions; by default what they need.
        """
        end, pad = self.lexicon.encode("<eos> <pad>")
        if reserve is None:
            reserve = sum(QUESTION_TOKENS[family] * n for family, n in counts.items())
        body = length - reserve - 4
        n_documents = self._n_documents(body, counts)
        facts = self.facts.make(counts)
        ids, weights = (part[: body + 1] for part in self._documents(facts, n_documents, body))
        answers: list[tuple[Kind, int, int]] = []
        for i in self.rng.permutation(len(facts.asked)):
            question = facts.asked[i][0]
            answer = question.answer + self.lexicon.encode(".")
            ids += question.prompt + answer
            weights += [TEXT] * len(question.prompt) + [ANSWER] * len(answer)
            answers.append((question.kind, len(ids) - len(answer), len(ids)))
        if (missing := length - len(ids)) > 0:
            ids += [end] + [pad] * (missing - 1)
            weights += [TEXT] + [PADDING] * (missing - 1)
        whole = [answer for answer in answers if answer[2] <= length]
        return Exam(np.array(ids[:length]), np.array(weights[:length], dtype=np.float32), whole)

    def collection(
        self, length: int, n_questions: int, kinds: Sequence[Kind] = KINDS, n_documents: int | None = None
    ) -> Collection:
        """Return a context of at most `length` tokens and `n_questions` questions, the kinds in turn.

        Args:
            length: Tokens of the context, at most.
            n_questions: How many questions to return; each may be asked right after the context.
            kinds: What to ask for, of `KINDS` and `DEPENDENT_KINDS`.
            n_documents: Documents to spread the facts over; by default 2 to 16, more in longer texts.

        Raises:
            ValueError: The facts do not fit the length, need more words than there are, or run through more documents
                than `n_documents`.
        """
        counts = counts_for(n_questions, kinds)
        least = least_documents(counts)
        if n_documents is not None and n_documents < least:
            raise ValueError(f"n_documents is {n_documents}: these kinds of questions need at least {least}")
        drawn = self._n_documents(length, counts) if n_documents is None else n_documents
        facts = self.facts.make(counts)
        context, _ = self._documents(facts, drawn, length)
        if len(context) > length:
            raise ValueError(f"the facts of {n_questions} questions need {len(context)} tokens, length is {length}")
        questions = [question for asked in facts.asked for question in asked if question.kind in kinds]
        return Collection(context, _kinds_in_turn(questions)[:n_questions])

    def _n_documents(self, length: int, counts: Mapping[Family, int]) -> int:
        return max(int(self.rng.integers(2, 3 + min(14, length // 128))), least_documents(counts))

    def _documents(self, facts: Facts, n: int, length: int) -> tuple[list[int], list[float]]:
        """Spread the facts over `n` documents and fill up to `length` tokens: never more, unless facts alone are.

        Returns:
            The tokens, and what the loss of each weighs.
        """
        begin, end = self.lexicon.encode("<doc> </doc>")
        home = np.sort(self.rng.integers(n, size=len(facts.sentences)))
        told: list[list[list[int]]] = [[] for _ in range(n)]
        for sentence, at in zip(facts.sentences, home, strict=True):
            told[at].append(sentence)
        for story in facts.stories:
            for part, at in zip(story, np.sort(self.rng.choice(n, len(story), replace=False)), strict=True):
                told[at].append(part)
        # A last sentence runs over its share by up to 9 tokens, and two tokens enclose a document.
        share = max(0, length - facts.tokens - 13 * n) // n
        ids = self.lexicon.encode("<bos>")
        for document in range(n):
            topic = self.rng.choice(self.lexicon.nouns, 12, replace=False)
            sentences: list[list[int]] = []
            filled = 0
            while filled < share:
                sentences.append(self._filler(topic))
                filled += len(sentences[-1])
            sentences += told[document]
            order = self.rng.permutation(len(sentences))
            ids += [begin, *(token for i in order for token in sentences[i]), end]
        weights = [ANSWER if token < 0 else TEXT for token in ids]
        return [~token if token < 0 else token for token in ids], weights

    def _filler(self, topic: np.ndarray) -> list[int]:
        lexicon = self.lexicon
        first, second = topic[self.rng.integers(len(topic), size=2)]
        adjective, verb = self._pick(lexicon.adjectives), self._pick(lexicon.verbs)
        match self.rng.integers(4):
            case 0:
                text = f"the {adjective} {first} {verb} the {second} ."
            case 1:
                place = f"{self._pick(lexicon.prepositions)} the {self._pick(topic)}"
                text = f"the {first} {verb} a {adjective} {second} {place} ."
            case 2:
                text = f"{self._pick(lexicon.times)} , the {first} {verb} the {adjective} {second} ."
            case _:
                text = f"the {first} was {adjective} and the {second} was {self._pick(lexicon.adjectives)} ."
        return lexicon.encode(text)

    def _pick(self, words: Sequence[str] | np.ndarray) -> str:
        return words[int(self.rng.integers(len(words)))]


def _kinds_in_turn(questions: list[Question]) -> list[Question]:
    by_kind: dict[Kind, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    return [question for turn in zip_longest(*by_kind.values()) for question in turn if question is not None]
