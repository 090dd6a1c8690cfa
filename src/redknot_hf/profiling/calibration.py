"""Prompts that make a model look things up, in its own tokenizer, without a download."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from .prompt import Prompt
from .wording import ADJECTIVES, MAKERS, QUESTIONS, UnwritableError, ids_of, sentences_for

_PASSAGE, _HINT = 96, 8  # tokens of a copied passage, and those of them that say which one it is
_KINDS = ("passkey", "pairs", "two_hop", "repeats", "text", "copy", "home", "boat")


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
    caller's texts, of which the second half is scored; `"copy"`, a passage of a text that comes again; `"home"`, the
    city of somebody's house; `"boat"`, what somebody calls a boat. They take turns, `"text"` where there are texts,
    which then also stand between the facts of `"passkey"`, `"two_hop"`, `"home"` and `"boat"` and are what is copied.
    `"codes"`, numbers of things in few and plain words, takes the place of kinds that a small vocabulary has no words
    for; these are left out with a warning.

    Args:
        tokenizer: The model's.
        length: Tokens of each prompt, whatever the tokenizer.
        count: Prompts.
        seed: The same arguments give the same prompts.

    Raises:
        ValueError: The length is too short for a kind, a kind is unknown, the tokenizer has no words for it, or texts
            are missing or too short.
    """
    kinds = calibration_kinds(texts, tokenizer) if kinds is None else kinds
    if not kinds:
        raise ValueError(f"kinds={kinds!r}: name some of {(*_KINDS, 'codes')}")
    rng = random.Random(seed)
    return [_prompt(tokenizer, length, kinds[i % len(kinds)], texts, rng) for i in range(count)]


def calibration_kinds(texts: Sequence[str] = (), tokenizer: Any = None) -> tuple[str, ...]:
    """The kinds that prompts are of by default; with a tokenizer, those that it has words for."""
    kinds = tuple(kind for kind in _KINDS if texts or kind != "text")
    written = tuple(kind for kind in kinds if tokenizer is None or _can_write(tokenizer, kind, texts))
    if written == kinds:
        return kinds
    plain = ("codes",) if _can_write(tokenizer, "codes", texts) else ()
    left = ", ".join(kind for kind in kinds if kind not in written)
    warnings.warn(f"the tokenizer has no words for {left}: prompts are {', '.join(plain + written)}", stacklevel=3)
    return plain + written


def _can_write(tokenizer: Any, kind: str, texts: Sequence[str]) -> bool:
    rng = random.Random(0)
    facts, asked = MAKERS[kind](rng) if kind in MAKERS else ((), ())
    sample = [*facts, *(text for text, _ in asked)]
    sample += {"pairs": ["\nbright-123: 4567"], "copy": ["\n"]}.get(kind, [])
    if kind in MAKERS or (kind == "copy" and not texts):
        sample.append(next(sentences_for(kind)(rng)))
    try:
        if any(tokenizer.unk_token_id in ids_of(tokenizer, text) for text in sample):
            return False
        for text in texts if kind in ("text", "copy") else ():
            ids_of(tokenizer, text)
    except UnwritableError:
        return False
    return True


def _prompt(tokenizer: Any, length: int, kind: str, texts: Sequence[str], rng: random.Random) -> Prompt:
    match kind:
        case "passkey" | "two_hop" | "home" | "boat" | "codes":
            return _hidden(tokenizer, length, kind, texts, rng)
        case "pairs":
            return _pairs(tokenizer, length, rng)
        case "repeats":
            return _repeats(tokenizer, length, rng)
        case "text":
            return _text(tokenizer, length, texts, rng)
        case "copy":
            return _copy(tokenizer, length, texts, rng)
    raise ValueError(f"kind {kind!r} is unknown: choose of {(*_KINDS, 'codes')}")


def _hidden(tokenizer: Any, length: int, kind: str, texts: Sequence[str], rng: random.Random) -> Prompt:
    """Facts at random places between other sentences, and questions at the end."""
    facts, asked = MAKERS[kind](rng)
    needles = [ids_of(tokenizer, fact) for fact in facts]
    tail = [(ids_of(tokenizer, text), scored) for text, scored in asked]
    start = _beginning(tokenizer)
    room = length - len(start) - sum(map(len, needles)) - sum(len(ids) for ids, _ in tail)
    if room < 0:
        raise ValueError(f"length={length}: a prompt of kind {kind!r} needs {length - room} tokens of this tokenizer")
    between = () if kind == "codes" else texts
    filler = _filler(tokenizer, room, between, rng, kind)
    return _asked(start + _scattered(needles, filler, rng), tail, kind)


def _scattered(needles: Sequence[list[int]], filler: list[int], rng: random.Random) -> list[int]:
    """The filler with the needles at random places in it, in their order."""
    places = sorted(rng.randint(0, len(filler)) for _ in needles)
    body, at = [], 0
    for place, needle in zip(places, needles, strict=True):
        body += filler[at:place] + needle
        at = place
    return body + filler[at:]


def _asked(body: list[int], tail: Sequence[tuple[list[int], bool]], kind: str) -> Prompt:
    """A text, and what is asked and answered behind it."""
    ids = body + [token for part, _ in tail for token in part]
    scored = [False] * len(body) + [flag for part, flag in tail for _ in part]
    return Prompt(torch.tensor(ids), torch.tensor(scored), kind)


def _pairs(tokenizer: Any, length: int, rng: random.Random) -> Prompt:
    """A list of keys and values as long as fits, whose beginning may be cut, and some of its keys again at the end."""
    names: set[str] = set()
    start = _beginning(tokenizer)

    def pair() -> tuple[str, str, list[int]]:
        while (name := f"{rng.choice(ADJECTIVES.split())}-{rng.randint(100, max(999, length))}") in names:
            pass
        names.add(name)
        entry = str(rng.randint(1000, 9999))
        return name, entry, ids_of(tokenizer, f"\n{name}: {entry}")

    lines = [pair() for _ in range(QUESTIONS)]
    asked = [lines[i] for i in rng.sample(range(QUESTIONS), QUESTIONS)]
    tail = [
        (ids_of(tokenizer, text), scored)
        for name, entry, _ in asked
        for text, scored in ((f"\n{name}:", False), (f" {entry}", True))
    ]
    room = length - len(start) - sum(len(ids) for _, _, ids in lines) - sum(len(ids) for ids, _ in tail)
    if room < 0:
        raise ValueError(f"length={length}: a prompt of kind 'pairs' needs {length - room} tokens of this tokenizer")
    while room:
        name, entry, ids = pair()
        lines.append((name, entry, ids[-room:]))
        room -= len(lines[-1][2])
    cut = lines.pop() if len(lines) > QUESTIONS else None
    rng.shuffle(lines)
    body = [token for _, _, ids in ([cut] if cut else []) + lines for token in ids]
    return _asked(start + body, tail, "pairs")


def _copy(tokenizer: Any, length: int, texts: Sequence[str], rng: random.Random) -> Prompt:
    """A passage somewhere in a text, and at its end the same passage again, scored behind its first tokens."""
    start, mark = _beginning(tokenizer), ids_of(tokenizer, "\n")
    passage = min(_PASSAGE, (length - len(start) - 2 * len(mark)) // 2)
    if passage <= _HINT:
        raise ValueError(f"length={length}: a prompt of kind 'copy' needs {2 * _HINT + 8} tokens of this tokenizer")
    filler = _filler(tokenizer, length - len(start) - len(mark) - passage, texts, rng)
    at = rng.randint(0, max(0, 3 * len(filler) // 4 - passage))
    again = filler[at : at + passage]
    tail = [(mark, False), (again[:_HINT], False), (again[_HINT:], True)]
    return _asked(start + filler, tail, "copy")


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


def _filler(tokenizer: Any, tokens: int, texts: Sequence[str], rng: random.Random, kind: str = "copy") -> list[int]:
    if texts:
        return _taken(tokenizer, tokens, texts, rng)
    ids: list[int] = []
    for sentence in sentences_for(kind)(rng):
        if len(ids) >= tokens:
            break
        ids += ids_of(tokenizer, sentence)
    return ids[:tokens]


def _taken(tokenizer: Any, tokens: int, texts: Sequence[str], rng: random.Random) -> list[int]:
    """Tokens of the caller's texts, begun with a random one."""
    ids: list[int] = []
    first = rng.randrange(len(texts))
    for i in range(len(texts)):
        if len(ids) < tokens:
            ids += _encoded(tokenizer, texts[(first + i) % len(texts)])
    if len(ids) < tokens:
        raise ValueError(f"the texts have {len(ids)} tokens and a prompt needs {tokens}: give more, or a lower length")
    at = rng.randint(0, len(ids) - tokens)
    return ids[at : at + tokens]


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer begins every text with, if it does."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


@lru_cache(maxsize=64)
def _encoded(tokenizer: Any, text: str) -> tuple[int, ...]:
    """A long text, which many prompts are taken of."""
    return tuple(ids_of(tokenizer, text))
