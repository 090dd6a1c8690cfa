"""What clients write, as ids: texts by the tokenizer, conversations by its chat template."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

from transformers.cli.serving.utils import build_response_parser, get_response_template

from .bodies import Content, Message
from .errors import RequestError

_Made = TypeVar("_Made")
# Where documents come in a conversation; drawn anew in each process, so that no client can have written it.
_HERE = f"\x02{uuid4().hex}\x03"


class Prompts:
    """Reads texts and conversations, off the event loop and one at a time, since a tokenizer is no thing to share.

    Args:
        tokenizer: Copied.
        chat_template: Instead of its own.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self._thread = ThreadPoolExecutor(1, "redknot tokenizer")

    async def read(self, text: str, first: bool = True) -> list[int]:
        """Ids of a text, with what the tokenizer begins texts with where it comes first.

        Raises:
            RequestError: The tokenizer cannot read it.
        """
        return await self._apart(partial(self._ids, text, first))

    async def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        options: Mapping[str, Any],
        parted: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation up to where the model answers, in two parts.

        Args:
            messages: The conversation.
            tools: What the model may call, as chat templates take it.
            options: For the template alone.
            parted: Documents come before the words of the first user, where the first part ends; else that is empty.

        Raises:
            RequestError: There is no template, or it refuses.
        """
        if self.chat_template is None:
            raise RequestError(
                400, "this model has no chat template: call /v1/completions, or start the server with --chat-template"
            )
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters
        if taken := [name for name in options if name in own]:
            raise RequestError(400, f"chat_template_kwargs.{taken[0]} is not for the template", param=taken[0])
        turns = [self._turn(x) for x in messages]
        if parted:
            user = next((turn for turn in turns if turn["role"] == "user"), None)
            if user is None:
                raise RequestError(400, "segments come before a user's words, and there are none", param="segments")
            user["content"] = _HERE + user["content"]
        return await self._apart(partial(self._chat, turns, tools, dict(options), parted))

    async def parser(self, model: Any, ids: Sequence[int], tools: Any) -> Any:
        """What tells thoughts and calls in an answer from text, by transformers; `None` where it does not know how.

        Args:
            model: That answers.
            ids: The conversation, of which the template may have begun the answer.
            tools: That the model may call.
        """
        return await self._apart(partial(self._parser, model, list(ids), tools))

    async def _apart(self, make: Callable[[], _Made]) -> _Made:
        return await asyncio.get_running_loop().run_in_executor(self._thread, make)

    def _ids(self, text: str, first: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=first)["input_ids"])
        except Exception as e:  # whatever a tokenizer raises: its words are all it knows
            raise RequestError(400, "the model's tokenizer cannot read this text", "unreadable_text") from e

    def _chat(self, turns: list[dict[str, Any]], tools: Any, options: dict[str, Any], parted: bool) -> Any:
        text = self._written(turns, tools, options)
        if tools and text == self._written(turns, None, options):
            raise RequestError(400, "the model's chat template knows no tools: leave them out", param="tools")
        if not parted:
            return [], self._ids(text, False)
        if text.count(_HERE) != 1:
            raise RequestError(400, "the model's chat template has no one place for segments", "chat_template")
        return tuple(self._ids(part, False) for part in text.split(_HERE))

    def _written(self, turns: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=tools, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False,
                **options,
            )  # fmt: skip
        except Exception as e:  # whatever a template raises of turns that it does not expect
            raise RequestError(400, "the model's chat template refuses these messages", "chat_template") from e

    def _parser(self, model: Any, ids: list[int], tools: Any) -> Any:
        template = get_response_template(self.tokenizer, model)
        if template is None:
            return None
        # Where an answer begins is not to be found if the chat template is of another kind: all of the conversation
        # would count as answer.
        begun = _begins(template, self.tokenizer.decode(ids))
        return build_response_parser(self.tokenizer, model, ids if begun else [], tools=tools)

    def _turn(self, message: Message) -> dict[str, Any]:
        """A message as chat templates take it."""
        role = message.role
        if role == "developer" and "developer" not in str(self.chat_template):
            role = "system"
        turn: dict[str, Any] = {"role": role, "content": text_of(message.content)}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(message, name) is not None:
                turn[name] = getattr(message, name)
        if message.tool_calls:
            turn["tool_calls"] = [
                {"id": x.id, "type": "function", "function": {"name": x.function.name, "arguments": _arguments(x)}}
                for x in message.tool_calls
            ]
        return turn


def text_of(content: Content) -> str:
    """All text of a message."""
    if content is None or isinstance(content, str):
        return content or ""
    return " ".join(part.text for part in content)


def _begins(template: Mapping[str, Any], text: str) -> bool:
    """Whether a text has the place in it at which a response template looks for the beginning of an answer."""
    anchors, pattern = template.get("start_anchor"), template.get("start_anchor_pattern")
    literals = [anchors] if isinstance(anchors, str) else anchors or ()
    return any(anchor in text for anchor in literals) or (pattern is not None and re.search(pattern, text) is not None)


def _arguments(call: Any) -> Any:
    """Templates go through them as through a mapping."""
    given = call.function.arguments
    try:
        return json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as e:
        raise RequestError(400, "the arguments of a tool call are no JSON", param="messages") from e
