"""Texts of a store as text: tokenized, with what begins a prompt before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redknot_hf.text.seams import Seams

if TYPE_CHECKING:
    from .segment import SegmentRef


class TakesTexts:
    """What a store does with text, by what it does with token ids."""

    add: Any
    add_all: Any

    def add_texts(self, texts: Sequence[str], tokenizer: Any, *, stand_in: bool = True) -> list[SegmentRef]:
        """Adds texts behind what begins a prompt, and returns the parts of a context that has them in this order.

        The first part is the beginning: the opening of the chat template, or `<bos>`; there is none if the tokenizer
        puts nothing before a text. Texts that the store has are not read again, so for other texts, or another order,
        call it again.

        Args:
            texts: Documents, each whole.
            tokenizer: The model's, or `Seams(tokenizer, ...)`, which says how they become tokens.
            stand_in: As in `add`.

        Raises:
            ValueError: There are no texts, or one is no text or has no tokens; as `add`.
        """
        if isinstance(texts, str):
            raise ValueError(f"{texts!r:.40} is one text: give a list of texts")
        if not texts:
            raise ValueError("there are no texts: give one at least")
        seams = Seams.of(tokenizer)
        documents = [seams.document(text) for text in texts]
        head = [self.add(seams.head)] if seams.head else []
        return [*head, *self.add_all(documents, *head, stand_in=stand_in)]
