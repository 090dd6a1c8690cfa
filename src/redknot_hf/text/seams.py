"""Where texts meet: documents and a question become tokens apart, and together are the tokens of the whole prompt.

A document that is stored once and reused anywhere must have the same tokens wherever it stands, so its tokens may not
depend on its neighbours; and yet they should be those that the model would see in the joined text. Both hold where the
neighbours are always alike. So the rule is: between two texts stands a separator, by default a blank line, which
belongs to the text before it, and each text becomes tokens as if between two separators with a word on the other side.
A tokenizer may join a full stop with the line breaks behind it, or part two line breaks before a letter; it sees both.
What stands before the first text is no separator: its tokens are right for any other place, and at most differ there
from those of the joined text in how a word's beginning is marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .chat import ChatTemplate

Ids = tuple[int, ...]
# The word on the other side of a separator, in every vocabulary that has letters; others lend a word of theirs.
_WORD = "x"


class Seams:
    """How texts become the tokens of a prompt: `head`, then `document` for each text, then `question`.

    Args:
        tokenizer: The model's.
        chat: Whether the tokenizer's chat template goes around documents and question, as one message of the user;
            None for a template where the tokenizer has one.
        system: The system's message, in the template.
        separator: Between two texts. An empty one leaves every text to the tokenizer as it is.

    Raises:
        ValueError: There is no template where one is asked for, or a system's message and no template.
    """

    def __init__(
        self, tokenizer: Any, *, chat: bool | None = None, system: str | None = None, separator: str = "\n\n"
    ) -> None:
        if chat is None:
            chat = bool(getattr(tokenizer, "chat_template", None))
        if system is not None and not chat:
            raise ValueError(
                "a system's message needs a chat template: leave system out, or begin the context with it"
            )
        self.tokenizer, self.separator = tokenizer, separator
        self._word = _word_of(tokenizer)
        self.template = ChatTemplate.of(tokenizer, system) if chat else None

    @classmethod
    def of(cls, given: Any) -> Seams:
        """Of a tokenizer, or seams as they are.

        Raises:
            TypeError: It is neither.
        """
        if isinstance(given, Seams):
            return given
        if not callable(given) or not hasattr(given, "decode"):
            raise TypeError(f"{given!r:.60} is no tokenizer: give the model's tokenizer, or Seams(tokenizer, ...)")
        return cls(given)

    @property
    def head(self) -> Ids:
        """What begins a prompt: the template's opening, or the special tokens that come before any text."""
        if self.template is not None:
            return self._ids(self.template.opening)
        marked, end = self._ids("", special=True), self.tokenizer.eos_token_id
        ends = marked[-1:] == (end,) and end != self.tokenizer.bos_token_id
        return marked[:-1] if ends else marked

    def document(self, text: str) -> Ids:
        """A text of the context, and the separator behind it.

        Raises:
            ValueError: It is no text, or has no tokens.
        """
        return self._between(_checked(text, "document") + self.separator, self._word if self.separator else "")

    def question(self, text: str) -> Ids:
        """What follows the context, up to where the answer begins.

        Raises:
            ValueError: It is no text, or has no tokens.
        """
        closing = "" if self.template is None else self.template.closing
        return self._between(_checked(text, "question") + closing, "")

    def questions(self, texts: Any) -> list[Ids]:
        """Each of several questions, or of one."""
        return [self.question(text) for text in ([texts] if isinstance(texts, str) else texts)]

    def answer(self, ids: Sequence[int]) -> str:
        """What the tokens of an answer say, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _between(self, text: str, after: str) -> Ids:
        """The tokens of a text behind a separator and before a word; alone, where a token would lie across."""
        if self.separator:
            opening = self._word + self.separator
            before = self._ids(opening + self._word)[:-1]
            ids, end = self._ids(opening + text + after), self._ids(self._word)[-1:] if after else ()
            stop = len(ids) - len(end)
            if ids[: len(before)] == before and ids[stop:] == end:
                return _some(ids[len(before) : stop], text)
        return _some(self._ids(text), text)

    def _ids(self, text: str, special: bool = False) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])


def _word_of(tokenizer: Any) -> str:
    words = getattr(tokenizer, "get_vocab", dict)()
    return _WORD if _WORD in words else next(filter(str.isalpha, sorted(words)), _WORD)


def _checked(text: Any, what: str) -> str:
    if not isinstance(text, str) or not text:
        raise ValueError(f"a {what} is {text!r:.40}: give a text with a word in it")
    return text


def _some(ids: Ids, text: str) -> Ids:
    if not ids:
        raise ValueError(f"{text!r:.40} has no tokens: leave it out")
    return ids
