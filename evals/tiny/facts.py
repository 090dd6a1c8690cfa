"""Facts in the bundled model's language, and the questions about them.

Most facts stand alone. Those of `DEPENDENT_KINDS` run through several documents, and what a later one says depends on
an earlier one: a person goes by a nickname, lives where somebody else lives, or a total grows. A reader that has not
seen the earlier documents cannot know what the later ones mean. Training texts tell it here and there, right after the
word: there the model learns to understand where it reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from evals.tiny.lexicon import Lexicon

Kind = Literal["code", "country", "place", "variable", "alias", "nickname", "companion", "total"]
KINDS: tuple[Kind, ...] = ("code", "country", "place", "variable", "alias")
DEPENDENT_KINDS: tuple[Kind, ...] = ("nickname", "companion", "total")

# What is asked for together: a family has facts that answer its kinds of questions.
Family = Literal["code", "person", "variable", "nickname", "companion", "total"]
FAMILIES: dict[Family, tuple[Kind, ...]] = {
    "code": ("code",),
    "person": ("country", "place"),
    "variable": ("variable", "alias"),
    "nickname": ("nickname",),
    "companion": ("companion",),
    "total": ("total",),
}
# The longest story that runs through successive documents.
MAX_STORY = 4
# Tokens that one fact of a family takes at most, with what distracts from it and what is told; and its question with
# the answer.
FACT_TOKENS: dict[Family, int] = {
    "code": 24, "person": 10, "variable": 13, "nickname": 22, "companion": 17, "total": 28
}  # fmt: skip
QUESTION_TOKENS: dict[Family, int] = {
    "code": 18, "person": 16, "variable": 17, "nickname": 11, "companion": 11, "total": 13
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one fact, ready to follow a context, and the tokens that answer it."""

    kind: Kind
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Facts:
    """What to hide in documents, and what may be asked about it.

    Attributes:
        sentences: They may stand in any document.
        asked: Per asked fact its questions, the one to ask first at the front.
        stories: Sentences that must stand in successive documents, in this order. A token that tells what the word
            before it stands for is stored as `~token`, below 0, until the text is made.
    """

    sentences: list[list[int]]
    asked: list[tuple[Question, ...]]
    stories: list[list[list[int]]] = field(default_factory=list)

    def __add__(self, other: "Facts") -> "Facts":
        return Facts(self.sentences + other.sentences, self.asked + other.asked, self.stories + other.stories)

    @property
    def tokens(self) -> int:
        """Length of all sentences."""
        return sum(map(len, self.sentences)) + sum(len(part) for story in self.stories for part in story)


class FactMaker:
    """Makes facts at random.

    Args:
        lexicon: The words.
        rng: Decides the facts; whoever hides them in texts draws from it too.
        told: How often a word that only earlier documents explain is followed by what it stands for.
    """

    def __init__(self, lexicon: Lexicon, rng: np.random.Generator, told: float) -> None:
        self.lexicon, self.rng, self.told = lexicon, rng, told

    def make(self, counts: Mapping[Family, int]) -> Facts:
        """Return facts to ask so many of each family for; what runs through documents uses no word twice."""
        alone: dict[Family, Callable[[int], Facts]] = {
            "code": self._codes,
            "person": self._people,
            "variable": self._variables,
        }
        running: dict[Family, Callable[[int, Facts], Facts]] = {
            "nickname": self._nicknames,
            "companion": self._companions,
            "total": self._totals,
        }
        facts = Facts([], [])
        for family, make in alone.items():
            if n := counts.get(family):
                facts += make(n)
        order = self.rng.permutation(len(facts.sentences))
        facts = Facts([facts.sentences[i] for i in order], facts.asked)
        for family, make_after in running.items():
            if n := counts.get(family):
                facts += make_after(n, facts)
        return facts

    def _codes(self, n: int) -> Facts:
        """Give codes to `2 n` things; the codes of the first `n` are asked for."""
        facts = Facts([], [])
        adjectives, nouns = self.lexicon.adjectives, self.lexicon.nouns
        for key in self.rng.permutation(len(adjectives) * len(nouns))[: 2 * n]:
            thing = f"the {adjectives[key // len(nouns)]} {nouns[key % len(nouns)]}"
            code = self._digits(4)
            facts.sentences.append(self.lexicon.encode(f"the code of {thing} is {code} ."))
            if len(facts.asked) < n:
                facts.asked.append((self._question("code", f"what is the code of {thing}", code),))
        return facts

    def _people(self, n: int) -> Facts:
        """Let `n` people live in cities, and the cities lie in countries: the country takes two hops."""
        facts = Facts([], [])
        people = self.rng.choice(self.lexicon.names, 2 * n, replace=False)
        cities = self.rng.choice(self.lexicon.cities, n, replace=False)
        countries = self.rng.choice(self.lexicon.countries, n)
        for person, city, country in zip(people[:n], cities, countries, strict=True):
            facts.sentences.append(self.lexicon.encode(f"{person} lives in {city} ."))
            facts.sentences.append(self.lexicon.encode(f"{city} is in {country} ."))
            hop = self._question("country", f"which country does {person} live in", f"{city} is in {country}")
            place = self._question("place", f"where does {person} live", city)
            facts.asked.append((hop, place) if self.rng.random() < 0.5 else (place, hop))
        return facts

    def _variables(self, n: int) -> Facts:
        """Let `n` variables have values, and `n` others equal them: those take two hops."""
        facts = Facts([], [])
        names = self.rng.choice(self.lexicon.variables, 2 * n, replace=False)
        for variable, other in zip(names[::2], names[1::2], strict=True):
            value = self._digits(3)
            facts.sentences.append(self.lexicon.encode(f"variable {variable} equals {value} ."))
            facts.sentences.append(self.lexicon.encode(f"variable {other} equals variable {variable} ."))
            direct = self._question("variable", f"what is the value of {variable}", value)
            alias = self._question("alias", f"what is the value of {other}", f"{variable} equals {value}")
            facts.asked.append((direct, alias) if self.rng.random() < 0.5 else (alias, direct))
        return facts

    def _nicknames(self, n: int, others: Facts) -> Facts:
        """Let `n` people go by a nickname, under which a later document speaks of them.

        Somebody else lives elsewhere under the same name, before it was theirs or after, so that who is meant can
        only be told where it is read, from what came before.
        """
        facts = Facts([], [])
        names = self._free(self.lexicon.names, 3 * n, others)
        cities = self._free(self.lexicon.cities, 2 * n, others)
        for i in range(n):
            person, other, nickname = names[3 * i : 3 * i + 3]
            city, wrong = cities[2 * i : 2 * i + 2]
            story = [
                self.lexicon.encode(f"{nickname} is person {person} ."),
                self._tell(nickname, person, f"lives in {city} ."),
            ]
            if self.rng.random() < 2 / 3:
                story = [self.lexicon.encode(f"{nickname} lives in {wrong} ."), *story]
            else:
                story += [
                    self.lexicon.encode(f"{nickname} is person {other} ."),
                    self._tell(nickname, other, f"lives in {wrong} ."),
                ]
            facts.stories.append(story)
            facts.asked.append((self._question("nickname", f"where does {person} live", city),))
        return facts

    def _companions(self, n: int, others: Facts) -> Facts:
        """Let `n` people live where somebody lives of whom an earlier document told, and who moves later."""
        facts = Facts([], [])
        names = self._free(self.lexicon.names, 2 * n, others)
        cities = self._free(self.lexicon.cities, 2 * n, others)
        for i in range(0, 2 * n, 2):
            person, other, city, next_city = names[i], names[i + 1], cities[i], cities[i + 1]
            same = self._tell(f"{person} lives where {other}", city, "lives .")
            before, after = (self.lexicon.encode(f"{other} lives in {home} .") for home in (city, next_city))
            facts.stories.append([before, same, after])
            facts.asked.append((self._question("companion", f"where does {person} live", city),))
        return facts

    def _totals(self, n: int, others: Facts) -> Facts:
        """Let `n` totals grow once or twice in later documents, and stay below ten."""
        facts = Facts([], [])
        for variable in self._free(self.lexicon.variables, n, others):
            total, *steps = (int(x) for x in self.rng.integers(1, 4, size=int(self.rng.integers(2, 4))))
            story = [self.lexicon.encode(f"the total of {variable} is number {total} .")]
            for step in steps:
                grown = self._tell(f"the total of {variable}", str(total), "grows by")
                total += step
                story.append(grown + self._tell(str(step), str(total), "."))
            facts.stories.append(story)
            facts.asked.append((self._question("total", f"what is the total of {variable}", str(total)),))
        return facts

    def _tell(self, start: str, meaning: str, rest: str) -> list[int]:
        """Return a sentence, and now and then tell in it what the last word of its start stands for."""
        told = self.told > 0 and self.rng.random() < self.told
        tokens = [~token for token in self.lexicon.encode(meaning)] if told else []
        return self.lexicon.encode(start) + tokens + self.lexicon.encode(rest)

    def _free(self, words: Sequence[str], n: int, facts: Facts) -> list[str]:
        """Return `n` of the words that these facts do not use."""
        used = {token for sentence in facts.sentences for token in sentence}
        used |= {token for story in facts.stories for part in story for token in part}
        free = [word for word in words if self.lexicon.id[word] not in used]
        if len(free) < n:
            raise ValueError(f"the facts need {n} more words, only {len(free)} are free: ask fewer questions a text")
        return self.rng.choice(free, n, replace=False).tolist()

    def _question(self, kind: Kind, text: str, answer: str) -> Question:
        return Question(kind, self.lexicon.encode(f"question : {text} ? answer :"), self.lexicon.encode(answer))

    def _digits(self, n: int) -> str:
        return " ".join(self.lexicon.digits[i] for i in self.rng.integers(10, size=n))


def least_documents(counts: Mapping[Family, int]) -> int:
    """Return how many documents these facts need, for what runs through several of them."""
    running: tuple[Family, ...] = ("nickname", "companion", "total")
    return MAX_STORY if any(counts.get(family) for family in running) else 1


def plain_counts(n_questions: int) -> dict[Family, int]:
    """Return facts by family for about `n_questions` of all `KINDS`, of which one fact may answer two."""
    third, quarter = max(1, n_questions // 3), max(1, n_questions // 4)
    return {"code": third, "person": third, "variable": quarter}


def counts_for(n_questions: int, kinds: Sequence[Kind]) -> dict[Family, int]:
    """Return facts by family that answer at least `n_questions` of these kinds.

    Plain kinds come with the facts of all plain kinds, which distract from each other.
    """
    if tuple(kinds) == KINDS:
        return plain_counts(n_questions)
    share = -(-n_questions // len(kinds))
    asked: dict[Family, int] = {family: share for family, held in FAMILIES.items() if set(held) & set(kinds)}
    if set(kinds) <= set(KINDS):
        plain = plain_counts(-(-3 * n_questions // len(kinds)))
        return {family: max(n, asked.get(family, 0)) for family, n in plain.items()}
    return asked
