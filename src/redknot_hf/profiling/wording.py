"""The words of calibration prompts: facts and questions about them, and what stands between."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

QUESTIONS = 8  # asked at the end of each prompt

_NAMES = (
    "Ada Amir Anna Bela Boris Carla Chen Dara Diego Elena Emil Farah Felix Greta Hana Hugo Ines Ivan Jana Jonas Kara "
    "Kofi Lena Luis Maya Milo Nadia Noor Olga Omar Petra Quentin Rosa Ruben Sana Sven Tara Tomas Uma Vera Viktor Yara"
)
_CITIES = (
    "Accra Athens Bergen Bogota Cairo Cork Dakar Delhi Dublin Geneva Hanoi Havana Jakarta Kyiv Kyoto Lagos Lima "
    "Lisbon London Lyon Madrid Malta Manila Milan Nairobi Oslo Ottawa Paris Porto Prague Quito Riga Rome Seoul "
    "Sofia Tunis"
)
_NOUNS = (
    "bridge clock garden harbor kettle ladder lantern letter market mirror museum orchard piano river school station "
    "table teacher tower train valley village violin wagon window writer"
)
_BOATS = (
    "acorn banner candle daisy eagle feather glacier hazel ivy jasper kestrel lotus maple nettle onyx pebble quail "
    "raven sparrow thistle umber vesper willow yarrow"
)
_PLAIN_NOUNS = "bridge clock garden harbor lantern market mirror museum river school station table tower valley window"
_PLAIN_VERBS = "borrowed carried cleaned closed followed guarded measured moved opened painted repaired sold watched"
_VERBS = "admires carries describes follows forgets guards hides paints praises repairs sells watches"
ADJECTIVES = "bright broken careful distant early empty gentle golden heavy humble narrow old patient quiet"

# Text, and whether the model should predict it.
Phrase = tuple[str, bool]
# Facts to hide in the text, and the questions with their answers.
Needles = tuple[list[str], list[Phrase]]


class UnwritableError(ValueError):
    """A tokenizer has no words for a text."""


def _passkeys(rng: random.Random) -> Needles:
    names = rng.sample(_NAMES.split(), QUESTIONS)
    keys = [str(rng.randint(10_000, 99_999)) for _ in names]
    facts = [f" The pass key of {name} is {key}. Remember it." for name, key in zip(names, keys, strict=True)]
    order = rng.sample(range(QUESTIONS), QUESTIONS)
    asked = [
        [(f"\nQuestion: what is the pass key of {names[i]}? Answer:", False), (f" {keys[i]}", True)] for i in order
    ]
    return facts, [phrase for pair in asked for phrase in pair]


def _two_hops(rng: random.Random) -> Needles:
    names, cities = rng.sample(_NAMES.split(), 2 * QUESTIONS), rng.sample(_CITIES.split(), QUESTIONS)
    friends = dict(zip(names[:QUESTIONS], names[QUESTIONS:], strict=True))
    homes = dict(zip(friends.values(), cities, strict=True))
    facts = [f" The best friend of {name} is {friend}." for name, friend in friends.items()]
    facts += [f" {friend} lives in {city}." for friend, city in homes.items()]
    rng.shuffle(facts)
    asked = [
        ((f"\nThe best friend of {name} lives in", False), (f" {homes[friends[name]]}", True)) for name in friends
    ]
    return facts, [phrase for pair in asked for phrase in pair]


def _homes(rng: random.Random) -> Needles:
    names, cities = rng.sample(_NAMES.split(), QUESTIONS), rng.sample(_CITIES.split(), QUESTIONS)
    homes = dict(zip(names, cities, strict=True))
    facts = [f" {name} has a house in {city}." for name, city in homes.items()]
    asked = [((f"\n{name} has a house in", False), (f" {homes[name]}", True)) for name in rng.sample(names, QUESTIONS)]
    return facts, [phrase for pair in asked for phrase in pair]


def _boats(rng: random.Random) -> Needles:
    """Words; some persons are not asked about."""
    names, boats = (rng.sample(words.split(), QUESTIONS * 3 // 2) for words in (_NAMES, _BOATS))
    facts = [f" {name} calls the boat '{boat}'." for name, boat in zip(names, boats, strict=True)]
    order = rng.sample(range(len(names)), QUESTIONS)
    asked = [((f"\n{names[i]} calls the boat '", False), (boats[i], True)) for i in order]
    return facts, [phrase for pair in asked for phrase in pair]


def _codes(rng: random.Random) -> Needles:
    things = rng.sample([f"{a} {n}" for a in ADJECTIVES.split() for n in _PLAIN_NOUNS.split()], QUESTIONS)
    codes = {thing: " ".join(rng.choice("0123456789") for _ in range(4)) for thing in things}
    facts = [f" the code of the {thing} is {code} ." for thing, code in codes.items()]
    asked = [
        ((f" question : what is the code of the {thing} ? answer :", False), (f" {codes[thing]}", True), (" .", False))
        for thing in rng.sample(things, QUESTIONS)
    ]
    return facts, [phrase for pair in asked for phrase in pair]


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        adjective, noun, verb, other, thing = (
            rng.choice(words.split()) for words in (ADJECTIVES, _NOUNS, _VERBS, ADJECTIVES, _NOUNS)
        )
        yield f" The {adjective} {noun} {verb} the {other} {thing}."


def _plain_sentences(rng: random.Random) -> Iterator[str]:
    while True:
        words = (ADJECTIVES, _PLAIN_NOUNS, _PLAIN_VERBS, ADJECTIVES, _PLAIN_NOUNS)
        adjective, noun, verb, other, thing = (rng.choice(each.split()) for each in words)
        yield f" the {adjective} {noun} {verb} a {other} {thing} ."


MAKERS: dict[str, Callable[[random.Random], Needles]] = {
    "passkey": _passkeys,
    "two_hop": _two_hops,
    "home": _homes,
    "boat": _boats,
    "codes": _codes,
}


def sentences_for(kind: str) -> Callable[[random.Random], Iterator[str]]:
    """What stands between the facts of a kind."""
    return _plain_sentences if kind == "codes" else _sentences


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on.

    Raises:
        UnwritableError: The tokenizer has no words for it.
    """
    try:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as e:
        if type(e) is not Exception:  # where a word is missing, tokenizers raise the bare one
            raise
        raise UnwritableError(f"the tokenizer has no words for {text!r:.60} ({e})") from e
