"""When an answer ends: tokens and strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from .request import Sampling


class Stopper:
    """Looks at every token of one answer.

    Args:
        sampling: What ends it.
        ends: The model's own ends.
        tokenizer: Needed for strings.
    """

    def __init__(self, sampling: Sampling, ends: Collection[int], tokenizer: Any) -> None:
        self.ids = {*sampling.stop_ids, *(() if sampling.ignore_eos else ends)}
        self.strings, self.tokenizer = tuple(sampling.stop), tokenizer
        # A string spans so many tokens at most, of which each has a byte at least.
        self._tail = max((len(text.encode()) for text in self.strings), default=0) + 4

    def ends(self, answer: Sequence[int]) -> bool:
        """Whether an answer ends with its last token."""
        if answer[-1] in self.ids:
            return True
        if not self.strings:
            return False
        text = self.tokenizer.decode(answer[-self._tail :], skip_special_tokens=True)
        return any(string in text for string in self.strings)


def before(text: str, strings: Sequence[str]) -> str:
    """A text up to the first of the strings."""
    return text[: min((at for at in map(text.find, strings) if at >= 0), default=len(text))]


def held_back(text: str, strings: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of one of the strings."""
    longest = max(map(len, strings), default=1) - 1
    ends = (text[-n:] for n in range(min(longest, len(text)), 0, -1))
    return next((len(end) for end in ends if any(string.startswith(end) for string in strings)), 0)
