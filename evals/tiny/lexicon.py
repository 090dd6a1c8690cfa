"""The words of the bundled model's language: common ones, and made-up names, cities, countries and variables."""

from collections.abc import Sequence

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
DEPENDENT = "same called own total grows by"
SPECIAL = "<pad> <bos> <eos> <doc> </doc>"


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
        known += DEPENDENT.split()  # last, so that the ids of all others stay
        self.words = list(dict.fromkeys(known))  # one city is also an adjective, and both share an id
        self.id = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.id[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)


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
