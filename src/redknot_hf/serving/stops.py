"""When an answer ends: tokens and strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from .request import Sampling


class Stopper:
    """Looks at every token of one answer.

    Attributes:
        tail: Last tokens of the answer that it looks at.

    Args:
        sampling: What ends it.
        ends: The model's own ends.
        tokenizer: Needed for strings.
    """

    def __init__(self, sampling: Sampling, ends: Collection[int], tokenizer: Any) -> None:
        self.ids = {*sampling.stop_ids, *(() if sampling.ignore_eos else ends)}
        self.strings, self.tokenizer = tuple(sampling.stop), tokenizer
        # A string spans so many tokens at most, of which each has a byte at least.
        self.tail = max(len(text.encode()) for text in self.strings) + 4 if self.strings else 1

    def ends(self, answer: Sequence[int]) -> bool:
        """Whether an answer, of which the last `tail` tokens are enough, ends with its last token."""
        if answer[-1] in self.ids:
            return True
        if not self.strings:
            return False
        last = answer[-self.tail :]
        # A string may name a special token, as `generate` takes it, or stand on both sides of one that nobody sees.
        texts = [self.tokenizer.decode(last, skip_special_tokens=skip) for skip in (True, False)]
        return any(string in text for string in self.strings for text in texts)


def ends_of(model: Any) -> tuple[int, ...]:
    """The tokens that end a model's answers, by its generation config."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)
