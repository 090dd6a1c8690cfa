"""Prompts that make a model look things up, in its own tokenizer, without a download."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .prompt import Prompt

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
_VERBS = "admires carries describes follows forgets guards hides paints praises repairs sells watches"
_ADJECTIVES = "bright broken careful distant early empty gentle golden heavy humble narrow old patient quiet"

# Text, and whether the model should predict it.
Piece = tuple[str, bool]
# Facts to hide in the text, and the questions with their answers.
Needles = tuple[list[str], list[Piece]]


def calibration_prompts(
    tokenizer: Any,
    *,
    length: int,
    count: int = 8,
    kinds: Sequence[str] | None = None,
    texts: Sequence[str] = (),
    seed: int = 0,
) -> list[Prompt]:
    """Makes prompts that need tokens from far away, and score what must be looked up.

    Kinds: `"passkey"`, numbers of persons; `"pairs"`, a list of keys and values; `"two_hop"`, the city of somebody's
    friend; `"repeats"`, random tokens and then the same again, which needs no words of the tokenizer; `"text"`, the
    caller's texts, of which the second half is scored. The first four take turns, and the fifth where there are texts,
    which then also stand between the facts of `"passkey"` and `"two_hop"`.

    Args:
        tokenizer: The model's.
        length: Tokens of each prompt.
        count: Prompts.
        seed: The same arguments give the same prompts.

    Raises:
        ValueError: The length is too short for a kind, a kind is unknown, or texts are missing or too short.
    """
    kinds = (*_MAKERS, "repeats", *(("text",) if texts else ())) if kinds is None else kinds
    rng = random.Random(seed)
    prompts = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        if kind == "repeats":
            prompts.append(_repeats(tokenizer, length, rng))
        elif kind == "text":
            prompts.append(_text(tokenizer, length, texts, rng))
        elif kind in _MAKERS:
            prompts.append(_hidden(tokenizer, length, kind, texts, rng))
        else:
            raise ValueError(f"kind {kind!r} is unknown: choose of {(*_MAKERS, 'repeats', 'text')}")
    return prompts


def read_texts(source: str, limit: int = 64, *, split: str = "train", column: str | None = None) -> list[str]:
    """Reads texts of a file (.txt, .json, .jsonl, .csv, .parquet) or of a data set of the Hub, by its id.

    Args:
        limit: Texts to read at most.
        split: Of the data set.
        column: Which one holds the text; by default "text", or else the first that holds strings.

    Raises:
        FileNotFoundError: The source is a path and there is no such file.
        ImportError: `datasets` is not installed.
        ValueError: There is no column of strings.
    """
    path = Path(source)
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise ImportError(f"reading {source} needs datasets: pip install 'redknot-hf[cli]', or give a .txt") from e
    builders = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix in builders:
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist: give a file, or the id of a data set of the Hub")
        rows = load_dataset(builders[path.suffix], data_files=source, split="train", streaming=True)
    else:
        rows = load_dataset(source, split=split, streaming=True)
    found = list(rows.take(limit))
    strings = [name for name, entry in (found[0] if found else {}).items() if isinstance(entry, str)]
    column = column or ("text" if "text" in strings else next(iter(strings), None))
    if column not in strings:
        raise ValueError(f"{source} has no column {column or 'of strings'}: name one of {strings}")
    return [row[column] for row in found]


def _hidden(tokenizer: Any, length: int, kind: str, texts: Sequence[str], rng: random.Random) -> Prompt:
    """Facts at random places between other sentences, and questions at the end."""
    facts, asked = _MAKERS[kind](rng, length)
    needles = [_ids(tokenizer, fact) for fact in facts]
    tail = [(_ids(tokenizer, text), scored) for text, scored in asked]
    start = _beginning(tokenizer)
    room = length - len(start) - sum(map(len, needles)) - sum(len(ids) for ids, _ in tail)
    if room < 0:
        raise ValueError(f"length={length}: a prompt of kind {kind!r} needs {length - room} tokens of this tokenizer")
    filler = _filler(tokenizer, room, texts, rng) if kind != "pairs" else []
    places = sorted(rng.randint(0, len(filler)) for _ in needles)
    body, at = list(start), 0
    for place, needle in zip(places, needles, strict=True):
        body += filler[at:place] + needle
        at = place
    body += filler[at:]
    ids = body + [token for part, _ in tail for token in part]
    scored = [False] * len(body) + [flag for part, flag in tail for _ in part]
    return Prompt(torch.tensor(ids), torch.tensor(scored), kind)


def _passkeys(rng: random.Random, length: int) -> Needles:
    names = rng.sample(_NAMES.split(), QUESTIONS)
    keys = [str(rng.randint(10_000, 99_999)) for _ in names]
    facts = [f" The pass key of {name} is {key}. Remember it." for name, key in zip(names, keys, strict=True)]
    order = rng.sample(range(QUESTIONS), QUESTIONS)
    asked = [
        [(f"\nQuestion: what is the pass key of {names[i]}? Answer:", False), (f" {keys[i]}", True)] for i in order
    ]
    return facts, [piece for pair in asked for piece in pair]


def _pairs(rng: random.Random, length: int) -> Needles:
    # As many as surely fit: a pair takes at most a token for each of its 20 letters.
    number = max(QUESTIONS, length // 24 - QUESTIONS)
    names = rng.sample([f"{word}-{i}" for word in _ADJECTIVES.split() for i in range(100, 1000)], number)
    pairs = {name: str(rng.randint(1000, 9999)) for name in names}
    facts = [f"\n{key}: {entry}" for key, entry in pairs.items()]
    keys = rng.sample(list(pairs), QUESTIONS)
    return facts, [piece for key in keys for piece in ((f"\n{key}:", False), (f" {pairs[key]}", True))]


def _two_hops(rng: random.Random, length: int) -> Needles:
    names, cities = rng.sample(_NAMES.split(), 2 * QUESTIONS), rng.sample(_CITIES.split(), QUESTIONS)
    friends = dict(zip(names[:QUESTIONS], names[QUESTIONS:], strict=True))
    homes = dict(zip(friends.values(), cities, strict=True))
    facts = [f" The best friend of {name} is {friend}." for name, friend in friends.items()]
    facts += [f" {friend} lives in {city}." for friend, city in homes.items()]
    rng.shuffle(facts)
    asked = [
        ((f"\nThe best friend of {name} lives in", False), (f" {homes[friends[name]]}", True)) for name in friends
    ]
    return facts, [piece for pair in asked for piece in pair]


_MAKERS: dict[str, Callable[[random.Random, int], Needles]] = {
    "passkey": _passkeys,
    "pairs": _pairs,
    "two_hop": _two_hops,
}


def _repeats(tokenizer: Any, length: int, rng: random.Random) -> Prompt:
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    start = _beginning(tokenizer)
    half = (length - len(start)) // 2
    if half < 2:
        raise ValueError(f"length={length}: a repeat needs 4 tokens")
    first = [rng.choice(ordinary) for _ in range(length - len(start) - half)]
    ids = start + first + first[:half]
    # What follows the first token again cannot be told before it is read.
    scored = torch.arange(len(ids)) > len(start) + len(first)
    return Prompt(torch.tensor(ids), scored, "repeats")


def _text(tokenizer: Any, length: int, texts: Sequence[str], rng: random.Random) -> Prompt:
    if not texts:
        raise ValueError("kind 'text' needs texts: pass texts=[...]")
    start = _beginning(tokenizer)
    ids = start + _taken(tokenizer, length - len(start), texts, rng)
    return Prompt(torch.tensor(ids), torch.arange(length) >= length // 2, "text")


def _filler(tokenizer: Any, tokens: int, texts: Sequence[str], rng: random.Random) -> list[int]:
    if texts:
        return _taken(tokenizer, tokens, texts, rng)
    ids: list[int] = []
    for sentence in _sentences(rng):
        if len(ids) >= tokens:
            break
        ids += _ids(tokenizer, sentence)
    return ids[:tokens]


def _taken(tokenizer: Any, tokens: int, texts: Sequence[str], rng: random.Random) -> list[int]:
    """Tokens of the caller's texts, begun with a random one."""
    ids: list[int] = []
    first = rng.randrange(len(texts))
    for i in range(len(texts)):
        if len(ids) < tokens:
            ids += _ids(tokenizer, texts[(first + i) % len(texts)])
    if len(ids) < tokens:
        raise ValueError(f"the texts have {len(ids)} tokens and a prompt needs {tokens}: give more, or a lower length")
    at = rng.randint(0, len(ids) - tokens)
    return ids[at : at + tokens]


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        adjective, noun, verb, other, thing = (
            rng.choice(words.split()) for words in (_ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS)
        )
        yield f" The {adjective} {noun} {verb} the {other} {thing}."


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer begins every text with, if it does."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
