"""The language of the bundled model: documents of filler and facts, and questions about the facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np

DIGITS = "0 1 2 3 4 5 6 7 8 9"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
ADJECTIVES = (
    "old young tall short quiet loud bright dark heavy light warm cold dry wet soft hard rough smooth narrow wide "
    "green blue red yellow white black brown gray silver golden early late quick slow gentle fierce humble proud "
    "clever curious patient honest brave careful cheerful lonely hungry sleepy rusty dusty empty broken hidden "
    "distant northern southern eastern western ancient modern simple strange plain wooden iron glass paper stone "
    "royal local foreign common rare sweet bitter sour fresh stale sharp blunt deep shallow"
)
NOUNS = (
    "baker sailor teacher doctor farmer painter singer weaver hunter miller tailor carpenter gardener merchant "
    "soldier scholar clerk judge guard pilot lantern bridge harbor market tower garden river mountain valley "
    "forest meadow window door table chair basket bottle candle ladder hammer needle rope wagon boat cart horse "
    "donkey goat sheep rooster rabbit fox wolf bear eagle sparrow owl letter book map coin ring crown sword "
    "shield drum flute bell clock mirror carpet blanket coat hat boot glove scarf apple pear plum cherry onion "
    "carrot cabbage bread cheese butter honey salt pepper sugar tea coffee wine well road field barn mill shop "
    "inn castle temple school library museum station island"
)
VERBS = (
    "carried found painted repaired bought sold lost hid moved cleaned watched followed guarded opened closed "
    "borrowed returned measured counted described remembered forgot praised visited left crossed reached "
    "admired ignored touched lifted dropped pushed pulled washed dried burned planted"
)
PREPOSITIONS = "near behind under above beside inside outside beyond toward against"
TIMES = "yesterday today tonight tomorrow always never often sometimes once again"
GLUE = (
    "the a of to in and is was then but so what which does live where code number variable equals value question "
    "answer part country city person says that with from it works as list document end start repeat after "
    "job lives owns key . , : ?"
)
SPECIAL = "<pad> <bos> <eos> <doc> </doc>"

# What a token's loss weighs in training: what can only be guessed, what is to be learned, what is nothing.
TEXT, ANSWER, PADDING = 0.1, 1.0, 0.0

Kind = Literal["code", "country", "place", "variable", "alias"]
KINDS: tuple[Kind, ...] = ("code", "country", "place", "variable", "alias")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one fact, ready to follow a context, and the tokens that answer it."""

    kind: Kind
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Collection:
    """A context of documents, and questions that each may be asked right after it."""

    context: list[int]
    questions: list[Question]


@dataclass(frozen=True, slots=True)
class Facts:
    """Sentences to hide in documents, and per asked fact its questions, the one to ask first."""

    sentences: list[list[int]]
    asked: list[tuple[Question, ...]]


class Lexicon:
    """All words of the language: a word's id is its place in `words`."""

    def __init__(self, seed: int = 7) -> None:
        rng = np.random.default_rng(seed)
        taken: set[str] = set()
        self.names = _invent(rng, 400, 3, taken)
        self.cities = _invent(rng, 200, 2, taken)
        self.countries = [stem + "land" for stem in _invent(rng, 60, 2, taken)]
        self.variables = _invent(rng, 200, 4, taken)
        self.digits, self.adjectives, self.nouns = DIGITS.split(), ADJECTIVES.split(), NOUNS.split()
        self.verbs, self.prepositions, self.times = VERBS.split(), PREPOSITIONS.split(), TIMES.split()
        known = [*SPECIAL.split(), *self.digits, *GLUE.split(), *self.adjectives, *self.nouns, *self.verbs]
        known += [*self.prepositions, *self.times, *self.names, *self.cities, *self.countries, *self.variables]
        self.words = list(dict.fromkeys(known))  # one city is also an adjective, and both share an id
        self.id = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.id[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)


class Corpus:
    """An endless source of texts; the seed decides them all."""

    def __init__(self, lexicon: Lexicon, seed: int) -> None:
        self.lexicon = lexicon
        self.rng = np.random.default_rng(seed)

    def sample(self, length: int, n_questions: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `length` tokens, documents with questions and answers at the end, and each token's loss weight."""
        end, pad = self.lexicon.encode("<eos> <pad>")
        body = length - 18 * n_questions - 4
        n_documents = self._n_documents(body)
        facts = self._facts(n_questions)
        ids = self._documents(facts.sentences, n_documents, body)[: body + 1]
        weights = [TEXT] * len(ids)
        for i in self.rng.permutation(len(facts.asked)):
            question = facts.asked[i][0]
            answer = question.answer + self.lexicon.encode(".")
            ids += question.prompt + answer
            weights += [TEXT] * len(question.prompt) + [ANSWER] * len(answer)
        if (missing := length - len(ids)) > 0:
            ids += [end] + [pad] * (missing - 1)
            weights += [TEXT] + [PADDING] * (missing - 1)
        return np.array(ids[:length]), np.array(weights[:length], dtype=np.float32)

    def collection(self, length: int, n_questions: int, kinds: Sequence[Kind] = KINDS) -> Collection:
        """Return a context of at most `length` tokens and `n_questions` questions, the kinds in turn."""
        n_documents = self._n_documents(length)
        facts = self._facts(n_questions if kinds == KINDS else -(-3 * n_questions // len(kinds)))
        context = self._documents(facts.sentences, n_documents, length)
        if len(context) > length:
            raise ValueError(f"the facts of {n_questions} questions need {len(context)} tokens, length is {length}")
        questions = [question for asked in facts.asked for question in asked if question.kind in kinds]
        return Collection(context, _kinds_in_turn(questions)[:n_questions])

    def _n_documents(self, length: int) -> int:
        return int(self.rng.integers(2, 3 + min(14, length // 128)))

    def _facts(self, n_questions: int) -> Facts:
        codes = self._codes(max(1, n_questions // 3))
        people = self._people(max(1, n_questions // 3))
        variables = self._variables(max(1, n_questions // 4))
        sentences = codes.sentences + people.sentences + variables.sentences
        order = self.rng.permutation(len(sentences))
        return Facts([sentences[i] for i in order], codes.asked + people.asked + variables.asked)

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
            facts.sentences.append(self.lexicon.encode(f"{city} is a city in {country} ."))
            hop = self._question("country", f"which country does {person} live in", f"{city} in {country}")
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

    def _question(self, kind: Kind, text: str, answer: str) -> Question:
        return Question(kind, self.lexicon.encode(f"question : {text} ? answer :"), self.lexicon.encode(answer))

    def _documents(self, facts: list[list[int]], n: int, length: int) -> list[int]:
        """Spread the facts over `n` documents and fill up to `length` tokens: never more, unless facts alone are."""
        begin, end = self.lexicon.encode("<doc> </doc>")
        home = np.sort(self.rng.integers(n, size=len(facts)))
        # A last sentence runs over its share by up to 9 tokens, and two tokens enclose a document.
        share = max(0, length - sum(map(len, facts)) - 13 * n) // n
        ids = self.lexicon.encode("<bos>")
        for document in range(n):
            topic = self.rng.choice(self.lexicon.nouns, 12, replace=False)
            sentences: list[list[int]] = []
            while sum(map(len, sentences)) < share:
                sentences.append(self._filler(topic))
            sentences += [fact for fact, at in zip(facts, home, strict=True) if at == document]
            order = self.rng.permutation(len(sentences))
            ids += [begin, *(token for i in order for token in sentences[i]), end]
        return ids

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

    def _digits(self, n: int) -> str:
        return " ".join(self.lexicon.digits[i] for i in self.rng.integers(10, size=n))


def _invent(rng: np.random.Generator, n: int, syllables: int, taken: set[str]) -> list[str]:
    """Make up `n` words that are not in `taken`, and add them there."""
    words: list[str] = []
    while len(words) < n:
        word = "".join(
            CONSONANTS[rng.integers(len(CONSONANTS))] + VOWELS[rng.integers(len(VOWELS))] for _ in range(syllables)
        )
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def _kinds_in_turn(questions: list[Question]) -> list[Question]:
    by_kind: dict[Kind, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    return [question for turn in zip_longest(*by_kind.values()) for question in turn if question is not None]
