"""What stands in, while a document is prefilled, for the text that will stand before it when it is reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from .ids import Ids, as_ids

# Tokens that are taken of one text, so that several come in.
_OF_ONE = 512


@dataclass(frozen=True)
class StandIn:
    """Text that documents are read behind when they are stored, and that is not stored itself.

    A document that is read first in its context looks like a beginning; in the midst of other documents its keys and
    values are others. Behind other text of its kind they come close to those, and that costs nothing when the document
    is reused. The best stand-in is of the user's own documents: what they have in common is then read as it is later,
    when others stand before. It is part of the address of all that is stored behind it, so make it once, of the same
    texts, and it is the same in every process.

    Attributes:
        pieces: Token ids of beginnings of texts, which follow each other.
        tokens: How many come before a document, at most.
    """

    pieces: tuple[tuple[int, ...], ...]
    tokens: int

    @staticmethod
    def of(texts: Sequence[Ids], tokens: int = 2048) -> StandIn:
        """Makes a stand-in of documents: of the beginnings of some, drawn by chance, and always the same.

        Args:
            texts: Token ids of documents; those that will be stored, or others of their kind.
            tokens: Its length. About half of what will stand before a document is good.

        Raises:
            ValueError: There is no text, or `tokens` is not positive.
        """
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: give a positive number")
        begins = {begin for text in texts if (begin := as_ids(text)[:_OF_ONE])}
        if not begins:
            raise ValueError("the texts have no tokens: give documents to make the stand-in of")
        pieces, largest = [], 0
        for begin in sorted(begins, key=lambda ids: hashlib.sha256(json.dumps(ids).encode()).digest()):
            pieces.append(begin)
            largest = max(largest, len(begin))
            if sum(map(len, pieces)) - largest >= tokens:  # whichever is left out
                break
        return StandIn(tuple(pieces), tokens)

    @staticmethod
    def taken(given: StandIn | Ids | None) -> StandIn:
        """One as callers have it: made of documents, token ids that are the same for all, or none."""
        if isinstance(given, StandIn):
            return given
        ids = as_ids(() if given is None else given)
        return StandIn((ids,), len(ids))

    def before(self, text: Sequence[int]) -> tuple[int, ...]:
        """What a text is read behind: the pieces, but for that of its own beginning."""
        others = (piece for piece in self.pieces if tuple(text[: len(piece)]) != piece)
        return tuple(token for piece in others for token in piece)[: self.tokens]
