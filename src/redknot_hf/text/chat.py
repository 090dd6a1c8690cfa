"""What a chat model's template writes around a message, so that the model answers it and does not go on with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MESSAGE = "<the user's message>"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """What a tokenizer's template writes around one message.

    Attributes:
        opening: Before the message, special tokens that begin a text and the system's message included.
        closing: Behind it, up to where the answer begins.
    """

    opening: str
    closing: str

    @classmethod
    def of(cls, tokenizer: Any, system: str | None = None) -> ChatTemplate:
        """Learn the template of a tokenizer.

        Args:
            tokenizer: Of a chat model.
            system: Message of the system; None leaves it to the template.

        Raises:
            ValueError: It has none, or one that does not keep the message as it is.
        """
        name = tokenizer.name_or_path or "the tokenizer"
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{name} has no chat template: ask without one, chat=False or no --chat")
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": _MESSAGE})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if text.count(_MESSAGE) != 1:
            raise ValueError(f"{name}: its chat template does not hold a message as it is written")
        return cls(*text.split(_MESSAGE))

    def tokens(self, tokenizer: Any) -> int:
        """Tokens that it adds to a prompt, or one or two more."""
        return sum(
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in (self.opening, self.closing)
        )
