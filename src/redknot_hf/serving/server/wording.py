"""From tokens to what a client reads: text as far as it is settled, cut at stop strings, told apart by kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cli.serving.utils import response_events_to_chunks

# A letter has four bytes at most; tokens that make none in so many are no letter any more.
_LETTER = 8


class Detokenizer:
    """Text of tokens as they come; the beginning of a letter is kept back until the letter is whole.

    Args:
        tokenizer: Any.
        special: Whether special tokens are text.
    """

    def __init__(self, tokenizer: Any, special: bool) -> None:
        self.tokenizer, self.special = tokenizer, special
        self._ids: list[int] = []
        self._first = self._told = 0  # tokens before `_told` were told; some of them say how the next are spaced

    def add(self, token: int) -> str:
        """What the token settles."""
        self._ids.append(token)
        text = self._untold()
        if text.endswith("\ufffd") and len(self._ids) - self._told < _LETTER:
            return ""
        self._first, self._told = self._told, len(self._ids)
        return text

    def rest(self) -> str:
        """What is left at the end."""
        text = self._untold()
        self._told = len(self._ids)
        return text

    def _untold(self) -> str:
        if self._told == len(self._ids):
            return ""
        return self._text(self._first, len(self._ids))[len(self._text(self._first, self._told)) :]

    def _text(self, first: int, last: int) -> str:
        return self.tokenizer.decode(self._ids[first:last], skip_special_tokens=not self.special)


class Cut:
    """Ends a text in front of the first stop string; what may be the beginning of one is kept back.

    Args:
        strings: That end it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.done = False
        self._held = ""

    def add(self, text: str) -> str:
        """What of the text is settled."""
        if self.done:
            return ""
        held = self._held + text
        found = [(held.find(string) + len(string), held.find(string)) for string in self.strings if string in held]
        if found:  # the one that was whole first, however the pieces came
            self.done, self._held = True, ""
            return held[: min(found)[1]]
        kept = max((_overlap(held, string) for string in self.strings), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def rest(self) -> str:
        """What was kept back."""
        held, self._held = self._held, ""
        return held


class Wording:
    """What one answer says: pieces of text, of thoughts (`ReasoningText`), and calls of tools (`ToolCall`).

    Calls and thoughts are told apart by transformers' own parser where the model has a response template; else all is
    text.

    Args:
        tokenizer: Of the model.
        stop: Strings that end the answer, and are not part of it.
        ends: Tokens that end it, and say nothing.
        parser: Of a conversation.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], ends: Sequence[int], parser: Any = None) -> None:
        self._text, self._cut, self._parser = Detokenizer(tokenizer, parser is not None), Cut(stop), parser
        self._ends = set(ends) if parser is None else set()
        self._first = [] if parser is None else response_events_to_chunks(parser.initial_events)

    def add(self, token: int) -> list[Any]:
        """Pieces that a token settles."""
        first, self._first = self._first, []
        if token in self._ends:
            return first
        return [*first, *self._parsed(self._cut.add(self._text.add(token)))]

    def rest(self) -> list[Any]:
        """Pieces that the end settles."""
        first, self._first = self._first, []
        pieces = [*first, *self._parsed(self._cut.add(self._text.rest()) + self._cut.rest())]
        if self._parser is None:
            return pieces
        try:
            events = self._parser.finalize()[1]
        except (ValueError, RuntimeError):  # the answer ended within a call, which is none then
            events = []
        return [*pieces, *response_events_to_chunks(events)]

    def _parsed(self, text: str) -> list[Any]:
        if not text:
            return []
        return [text] if self._parser is None else response_events_to_chunks(self._parser.feed(text))


def _overlap(text: str, string: str) -> int:
    """Letters at the end of a text that a string begins with."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
