"""Items: a long text in which facts are hidden, with many questions behind it that are answered in one pass.

Four kinds of questions, and running text: five-digit numbers, words and codes that were said somewhere in the text,
and a passage that is to be copied. None of the words around them is one of the calibration's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

TASKS = ("numbers", "words", "codes", "copied", "text")
_NUMBERS, _WORDS, _CODES, _LINES = 10, 14, 10, 40  # asked, and lines of the table of codes
_PASSAGE, _HINT = 96, 8  # tokens of a passage, and those of them that say which one it is
_TEXT = 256  # tokens of running text that are scored, of the text's second half
_GAP = 1500  # tokens between the text and the passage that is copied into it


def _listed(text: str) -> list[str]:
    return text.split(",")


_ADJECTIVES = _listed(
    "amber,brisk,calm,dusty,eager,faint,grand,hollow,ivory,jolly,keen,lunar,mellow,noble,olive,"
    "plain,quick,rusty,sunny,tidy,upper,vivid,woolly,young"
)
_NOUNS = _listed(
    "anchor,basket,canyon,dragon,engine,falcon,guitar,hammer,island,jacket,kitten,ladle,magnet,needle,"
    "oyster,pepper,quartz,rocket,saddle,tunnel,urchin,violet,walnut,zipper"
)
_PEOPLE = _listed(
    "Agnes,Bruno,Celia,Derek,Edith,Frank,Gloria,Henry,Irene,Jacob,Karen,Louis,Martha,Nigel,Oscar,"
    "Paula,Roger,Sylvia,Trevor,Ursula,Victor,Wendy"
)


@dataclass
class Item:
    """A text with its questions and answers.

    Attributes:
        ids: All of its tokens.
        context: How many of them come before the first question.
        answers: Of every task the places of each answer's tokens; an answer is right if all of them are.
    """

    ids: list[int]
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    context: int = 0

    @property
    def places(self) -> list[int]:
        """All places that are scored, ascending."""
        return sorted({place for answers in self.answers.values() for answer in answers for place in answer})

    def add(self, ids: Sequence[int], task: str | None = None) -> None:
        """Appends tokens, as an answer of a task if one is named."""
        first = len(self.ids)
        self.ids += ids
        if task:
            self.answers.setdefault(task, []).append(list(range(first, len(self.ids))))


def items(tokenizer: Any, text: str, length: int, count: int, seed: int = 0) -> Iterator[Item]:
    """Yields items of exactly `length` tokens, in stretches of a text; a larger count only appends.

    Raises:
        ValueError: The text is too short for the length, or the length for the questions.
    """

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    source = encode(text)
    for index in range(count):
        yield _item(random.Random(f"{seed}-{length}-{index}"), encode, source, length)


def _item(rng: random.Random, encode: Any, source: list[int], length: int) -> Item:
    facts, asked = _facts(rng, encode)
    line = encode("\n")
    tail = sum(len(question) + len(answer) for question, answer, _ in asked) + 2 * len(line) + 2 * _PASSAGE
    room = length - tail - sum(map(len, facts))
    if room < 2 * _TEXT:
        raise ValueError(f"length is {length}: an item of this tokenizer needs {length - room + 2 * _TEXT} tokens")
    if len(source) < room + _GAP + _PASSAGE:
        raise ValueError(f"the text has {len(source)} tokens, an item of {length} needs {room + _GAP + _PASSAGE}")
    start = rng.randint(0, len(source) - room - _GAP - _PASSAGE)
    passage = source[start + room + _GAP : start + room + _GAP + _PASSAGE]
    body = _hidden(rng, source[start : start + room], facts)
    at = rng.randint(0, len(body) // 4)
    item = Item(body[:at] + line + passage + body[at:], context=len(body) + len(line) + len(passage))
    half = range(len(item.ids) // 2, len(item.ids))
    item.answers["text"] = [[place] for place in list(half)[:: max(1, len(half) // _TEXT)][:_TEXT]]
    for question, answer, task in asked:
        item.add(question)
        item.add(answer, task)
    item.add(line)
    first = len(item.ids)
    item.add(passage)
    item.answers["copied"] = [[place] for place in range(first + _HINT, len(item.ids))]
    return item


def _facts(rng: random.Random, encode: Any) -> tuple[list[list[int]], list[tuple[list[int], list[int], str]]]:
    """Facts to hide, and questions with their answers in the order in which they are asked."""
    keys = rng.sample([f"{adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS], _NUMBERS)
    numbers = {key: str(rng.randint(10_000, 99_999)) for key in keys}
    words = dict(zip(rng.sample(_PEOPLE, _WORDS), rng.sample(_NOUNS, _WORDS), strict=True))
    names = rng.sample([f"{noun}_{i}" for noun in _NOUNS for i in range(10, 100)], _LINES)
    codes = {name: str(rng.randint(1000, 9999)) for name in names}
    facts = [f"\nOne of the special magic numbers for {key} is: {number}.\n" for key, number in numbers.items()]
    facts += [f'\nThe secret word of {name} is "{word}".\n' for name, word in words.items()]
    facts.append("\n" + "".join(f"{name} = {code}\n" for name, code in codes.items()))
    asked = [(f"\nOne of the special magic numbers for {key} is:", f" {numbers[key]}", "numbers") for key in keys]
    asked += [(f'\nThe secret word of {name} is "', word, "words") for name, word in words.items()]
    rng.shuffle(asked)
    asked += [(f"\n{name} =", f" {codes[name]}", "codes") for name in rng.sample(names, _CODES)]
    return [encode(fact) for fact in facts], [(encode(q), encode(a), task) for q, a, task in asked]


def _hidden(rng: random.Random, body: list[int], facts: list[list[int]]) -> list[int]:
    """The body with the facts at random places in it, in any order."""
    places, found, at = sorted(rng.randint(0, len(body)) for _ in facts), [], 0
    for place, fact in zip(places, rng.sample(facts, len(facts)), strict=True):
        found += body[at:place] + fact
        at = place
    return found + body[at:]
