"""Contexts for reuse: documents of English text with facts hidden in them, and questions about these."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

KINDS = ("number", "word", "friend", "copy", "text", "summary")
OPENING = "Here are some documents. Read them with care.\n"
ADJECTIVES = (
    "amber",
    "brisk",
    "calm",
    "dusty",
    "eager",
    "faint",
    "grand",
    "hollow",
    "ivory",
    "jolly",
    "keen",
    "lunar",
)
NOUNS = ("anchor", "basket", "canyon", "dragon", "engine", "falcon", "guitar", "hammer", "island", "jacket", "kitten")
NAMES = (
    "Ada", "Amir", "Anna", "Boris", "Carla", "Diego", "Elena", "Felix", "Greta", "Hugo", "Ivan", "Jonas", "Lena",
    "Maya", "Nadia", "Omar", "Petra", "Rosa", "Sven", "Tara", "Ugo", "Vera", "Wanda", "Xenia", "Yusuf", "Zora",
)  # fmt: skip
# Tokens at the end of a document among which no facts are, and which the last leaves for `text`.
_CONTINUED = 80


@dataclass(frozen=True)
class Asked:
    """A question, the tokens that answer it, and the document (of the context's, from 1) that it is about."""

    kind: str
    prompt: list[int]
    answer: list[int]
    document: int


class Maker:
    """Makes contexts out of text and facts, always the same."""

    def __init__(self, tokenizer: Any) -> None:
        self.enc: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.text = self.enc("\n".join(text for _, text in sorted(topics.items())))

    def context(
        self, seed: int, documents: int, tokens: int, kinds: Sequence[str]
    ) -> tuple[list[list[int]], list[Asked]]:
        """One context, an opening and its documents, and the questions about it in random order."""
        rng = random.Random(seed)
        people = rng.sample(NAMES, 3 * documents)
        keys = rng.sample([f"{a} {b}" for a in ADJECTIVES for b in NOUNS], 2 * documents)
        words = [rng.choice(NOUNS) for _ in range(2 * documents)]
        made, questions = [self.enc(OPENING)], []
        for i in range(documents):
            facts, about = [], i + 1
            for j in (2 * i, 2 * i + 1):
                asked, number = f"\nOne of the special magic numbers for {keys[j]} is:", rng.randint(10000, 99999)
                facts.append(f"{asked} {number}.\n")
                questions.append(self._asked("number", asked, f" {number}", about))
                asked = f'\nThe secret word of {people[j]} is "'
                facts.append(f'{asked}{words[j]}".\n')
                questions.append(self._asked("word", asked, words[j], about))
            friend, other = people[2 * documents + i], (2 * i + 2) % (2 * documents)
            facts.append(f"\nThe best friend of {friend} is {people[other]}.\n")
            asked = f'\nThe secret word of the best friend of {friend} is "'
            questions.append(self._asked("friend", asked, words[other], about))
            questions.append(self._asked("summary", f"\n\nIn a few words, document {about} is about", "", about))
            made.append(self._document(about, [self.enc(fact) for fact in facts], tokens, rng))
            at = rng.randrange(tokens // 2, tokens - 48 - _CONTINUED)
            passage = made[about][at : at + 48]
            questions.append(Asked("copy", [*self.enc("\n\n"), *passage[:16]], passage[16:], about))
        rest = made[-1][-_CONTINUED:]
        questions.append(Asked("text", rest[:16], rest[16:], documents))
        made[-1] = made[-1][:-_CONTINUED]
        rng.shuffle(questions)
        return made, [q for q in questions if q.kind in kinds]

    def _asked(self, kind: str, prompt: str, answer: str, document: int) -> Asked:
        return Asked(kind, self.enc(prompt), self.enc(answer), document)

    def _document(self, number: int, facts: list[list[int]], tokens: int, rng: random.Random) -> list[int]:
        """Running text with facts at random places in it."""
        head = self.enc(f"\n\nDocument {number}:\n")
        room = tokens - len(head) - sum(map(len, facts))
        start = rng.randrange(len(self.text) - room)
        seams = [0, *sorted(rng.randint(0, room - _CONTINUED) for _ in facts), room]
        rng.shuffle(facts)
        made = list(head)
        for (a, b), fact in zip(pairwise(seams), [*facts, []], strict=True):
            made += [*self.text[start + a : start + b], *fact]
        return made
