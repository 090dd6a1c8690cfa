"""Questions in the bundled model's own language: documents of filler and facts, generated at any length."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as counted
from itertools import islice
from typing import Any

from evals.task import Example
from evals.tiny.corpus import Collection, Corpus
from evals.tiny.examination import HELD_OUT
from evals.tiny.facts import DEPENDENT_KINDS, KINDS, Kind
from evals.tiny.lexicon import Lexicon

MIXES: dict[str, tuple[Kind, ...]] = {"all": (*KINDS, *DEPENDENT_KINDS), "plain": KINDS, "dependent": DEPENDENT_KINDS}
SINGLE: dict[str, tuple[Kind, ...]] = {kind: (kind,) for kind in MIXES["all"]}
ASKED = MIXES | SINGLE
NAMES = tuple(f"tiny/{part}" for part in ASKED)

# The longest question, without its answer, and the longest answer with its full stop.
QUESTION_TOKENS, ANSWER_TOKENS = 13, 6


def load(name: str, source: str | None) -> "TinyTask":
    """Return the task of this name, which takes no source."""
    if source is not None:
        raise ValueError(f"{name} makes its own texts and takes no source, not {source!r}")
    return TinyTask(name, ASKED[name.removeprefix("tiny/")])


@dataclass(frozen=True, slots=True)
class TinyTask:
    """Questions about facts of one text, of these kinds in turn; about one per 100 tokens, at most 24 a text.

    Of an example's documents the first is the token that begins every text.
    """

    name: str
    kinds: tuple[Kind, ...]
    metric: str = "exact_match"

    def examples(self, tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Example]:
        """See `Task.examples`. Questions of one text follow each other; a larger count only appends."""
        lexicon = Lexicon()
        if tokenizer.get_vocab() != lexicon.id:
            raise ValueError(f"{self.name} is written in the language of evals/tiny: use that model and its tokenizer")
        return islice(self._all(lexicon, length, seed), count)

    def _all(self, lexicon: Lexicon, length: int, seed: int) -> Iterator[Example]:
        n_questions = max(4, min(24, length // 100))
        for text in counted():
            drawn = Corpus(lexicon, (HELD_OUT, zlib.crc32(self.name.encode()), seed, length, text))
            collection = drawn.collection(length - QUESTION_TOKENS, n_questions, self.kinds)
            yield from self._ask(lexicon, collection, f"{self.name}-{length}-{seed}-{text}")

    def _ask(self, lexicon: Lexicon, collection: Collection, text: str) -> Iterator[Example]:
        context = lexicon.decode(collection.context)
        opening, *documents = context.split(" <doc> ")
        for place, question in enumerate(collection.questions):
            yield Example(
                id=f"{text}-{place}",
                context=context,
                question=f" {lexicon.decode(question.prompt)}",
                answers=(lexicon.decode(question.answer),),
                max_new_tokens=ANSWER_TOKENS,
                stop=" .",
                kind=question.kind,
                documents=(opening, *(f" <doc> {document}" for document in documents)),
            )
