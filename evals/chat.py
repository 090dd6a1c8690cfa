"""What a chat model's template writes around a message, so that the model answers it and does not go on with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MESSAGE = "<the user's message>"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """What a tokenizer's template writes around one message.

    Attributes:
        opening: Before the message, special tokens that begin a text included.
        closing: Behind it, up to where the answer begins.
    """

    opening: str
    closing: str

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """Learn the template of a tokenizer.

        Raises:
            ValueError: It has none, or one that does not keep the message as it is.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template: ask without --chat")
        message = [{"role": "user", "content": _MESSAGE}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if text.count(_MESSAGE) != 1:
            raise ValueError(f"{tokenizer.name_or_path}: its chat template does not hold a message as it is written")
        return cls(*text.split(_MESSAGE))

    def tokens(self, tokenizer: Any) -> int:
        """Tokens that it adds to a prompt, or one or two more."""
        return sum(
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in (self.opening, self.closing)
        )
