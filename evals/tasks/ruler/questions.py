"""RULER's questions about passages, of one hop and of two: of an invented world, or of passages in a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.task import Example
from evals.tasks.documents import Inquiry, Passage, ask
from evals.tasks.vocabulary import adjectives, distinct, listed, nouns, pick, proper_name, with_articles

CRAFTS = listed("glass,pottery,violins,clocks,paper,ropes,bells,ink,wool,knives,lace,cider,bricks,boats,candles")
TRADES = listed(
    "baker,painter,judge,surgeon,printer,sailor,botanist,tailor,teacher,blacksmith,astronomer,farmer,weaver,poet"
)


@dataclass(frozen=True, slots=True)
class World:
    """Towns, each with one founder, who was born in another town. No one knows them from anywhere else.

    Attributes:
        hops: 1 asks what one passage says, 2 what two must say together.
    """

    hops: int

    def __call__(self, rng: np.random.Generator, index: int, size: int, length: int) -> Example:
        """See `Draw`: the size counts passages, each of a town or of its founder."""
        n = (size + 1) // 2
        names = distinct(rng, proper_name, 3 * n + 1)
        towns, first, last, end = names[:n], names[n : 2 * n], names[2 * n : -1], names[-1]
        people = [f"{one} {other}" for one, other in zip(first, last, strict=True)]
        births = [*towns[1:], end]
        told = [self._tell(rng, *who) for who in zip(towns, people, births, strict=True)]
        chosen = int(rng.integers(n))
        town, person, year, trade = told[chosen]
        inquiry = self._inquire(rng, (towns[chosen], people[chosen], births[chosen]), (year, trade), town, person)
        others = [passage for pair in told for passage in pair[:2] if passage not in inquiry.needed]
        return ask(rng, inquiry, others[: size - len(inquiry.needed)])

    def _tell(self, rng: np.random.Generator, town: str, person: str, birth: str) -> tuple[Passage, Passage, str, str]:
        year, born = int(rng.integers(1500, 1900)), int(rng.integers(24, 60))
        trade, craft = pick(rng, TRADES), pick(rng, CRAFTS)
        about_town = (
            f"{town} is a {pick(rng, adjectives)} town known for its {craft}. It was founded in {year} by {person}. "
            f"In the middle of its market stands a {pick(rng, adjectives)} {pick(rng, nouns)}, "
            f"and visitors come to see the {pick(rng, nouns)} festival."
        )
        about_person = (
            f"{person} was a {trade} who was born in {birth} in {year - born}. "
            f"Before turning forty, {person.split()[0]} had built a {pick(rng, adjectives)} {pick(rng, nouns)} "
            f"and written a book about the {pick(rng, nouns)}."
        )
        told = [Passage(title, with_articles(text)) for title, text in ((town, about_town), (person, about_person))]
        return told[0], told[1], str(year), trade

    def _inquire(
        self,
        rng: np.random.Generator,
        names: tuple[str, str, str],
        facts: tuple[str, str],
        about_town: Passage,
        about_person: Passage,
    ) -> Inquiry:
        (town, person, birth), (year, trade) = names, facts
        asked = (
            [
                (f"In which year was {town} founded?", year, (about_town,)),
                (f"Who founded {town}?", person, (about_town,)),
                (f"In which town was {person} born?", birth, (about_person,)),
                (f"What was the trade of {person}?", trade, (about_person,)),
            ]
            if self.hops == 1
            else [
                (f"In which town was the founder of {town} born?", birth, (about_town, about_person)),
                (f"What was the trade of the founder of {town}?", trade, (about_town, about_person)),
            ]
        )
        question, answer, needed = asked[int(rng.integers(len(asked)))]
        return Inquiry("", question, (answer,), needed)


def read_inquiries(source: str) -> list[Inquiry]:
    """Read questions from a file of JSON lines.

    Each line is `{"question": ..., "answers": [...], "passages": [{"title": ..., "text": ..., "needed": true}, ...]}`.

    Raises:
        ValueError: A line lacks one of these fields, or names no needed passage.
    """
    found: list[Inquiry] = []
    for number, line in enumerate(Path(source).read_text().splitlines(), start=1):
        try:
            found.append(_inquiry(f"{Path(source).stem}-{number}", json.loads(line)))
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{source}, line {number}: {error!r}; see read_inquiries for the format") from error
        if not found[-1].needed:
            raise ValueError(f"{source}, line {number}: no passage has needed = true")
    return found


def _inquiry(name: str, row: dict[str, Any]) -> Inquiry:
    needed = [bool(passage.get("needed")) for passage in row["passages"]]
    passages = [Passage(passage["title"], passage["text"]) for passage in row["passages"]]
    return Inquiry(
        id=name,
        question=row["question"],
        answers=tuple(row["answers"]),
        needed=tuple(passage for passage, is_needed in zip(passages, needed, strict=True) if is_needed),
        others=tuple(passage for passage, is_needed in zip(passages, needed, strict=True) if not is_needed),
    )
