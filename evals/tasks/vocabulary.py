"""Words, names and numbers to make texts of, drawn without repetition."""

import uuid
from collections.abc import Callable, Sequence

import numpy as np

from evals.tiny.corpus import ADJECTIVES, NOUNS, VERBS


def listed(text: str) -> list[str]:
    """Return the parts of a text between its commas."""
    return [part.strip() for part in text.split(",")]


CONSONANTS = listed("b,br,d,dr,f,g,gl,h,k,kr,l,m,n,p,pl,r,s,st,t,tr,v,w")
VOWELS, ENDINGS = listed("a,e,i,o,u,ai,ea,ou"), listed("l,m,n,r,s,th,nd,rk,lm,st")

adjectives, nouns = ADJECTIVES.split(), NOUNS.split()
# Plain words first, then thousands that are put together of two nouns.
plain_words = sorted({*adjectives, *nouns, *VERBS.split()})
compounds = [first + second for first in nouns for second in nouns if first != second]


def pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Return one of the words."""
    return words[int(rng.integers(len(words)))]


def distinct(rng: np.random.Generator, make: Callable[[np.random.Generator], str], n: int) -> list[str]:
    """Return `n` different things of a kind, in the order in which they were made."""
    made: dict[str, None] = {}
    while len(made) < n:
        made[make(rng)] = None
    return list(made)


def word_pair(rng: np.random.Generator) -> str:
    """Return an adjective and a noun, like `quiet-harbor`."""
    return f"{pick(rng, adjectives)}-{pick(rng, nouns)}"


def number(rng: np.random.Generator, digits: int = 7) -> str:
    """Return a number of this many digits, which does not begin with 0."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def uuid4(rng: np.random.Generator) -> str:
    """Return a UUID."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def letters(rng: np.random.Generator, n: int, alphabet: str) -> str:
    """Return a word of `n` letters that means nothing."""
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=n))


def proper_name(rng: np.random.Generator) -> str:
    """Return an invented name of two syllables, like `Braimoth`."""
    first, second = (pick(rng, CONSONANTS) + pick(rng, VOWELS) for _ in range(2))
    return (first + second + pick(rng, ENDINGS)).capitalize()


def listed_words(rng: np.random.Generator, n: int) -> list[str]:
    """Return `n` different English words or compounds of them.

    Raises:
        ValueError: There are fewer.
    """
    words = plain_words if n <= len(plain_words) else plain_words + compounds
    if n > len(words):
        raise ValueError(f"{n} different words are wanted, there are {len(words)}: ask for a shorter length")
    return [words[i] for i in rng.permutation(len(words))[:n]]
