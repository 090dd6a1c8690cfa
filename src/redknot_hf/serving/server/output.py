"""The output of `/v1/responses`: items that open, grow and close, and the events that tell of it."""

from __future__ import annotations

from typing import Any

from transformers.cli.serving.utils import ReasoningText, ToolCall

from .answers import Piece
from .events import Likely


class Output:
    """Items of an answer, in the order in which the model wrote them.

    Attributes:
        items: Those that are whole.

    Args:
        number: Of the HTTP request.
        likely: For log-probabilities; `None` gives none.
    """

    def __init__(self, number: str, likely: Likely | None) -> None:
        self.items: list[dict[str, Any]] = []
        self._number, self._likely = number, likely
        self._kind: str | None = None
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self._events = 0

    def event(self, kind: str, **content: Any) -> dict[str, Any]:
        """The next event."""
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **content}

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """What a piece of the answer changes."""
        events: list[dict[str, Any]] = []
        logprobs = [] if self._likely is None else [self._likely(token) for token in piece.tokens]
        for part in piece.parts:
            if isinstance(part, ToolCall):
                events += [*self.close(), *self._call(part)]
                continue
            kind = "reasoning" if isinstance(part, ReasoningText) else "message"
            if self._kind != kind:
                events += [*self.close(), *self._open(kind)]
            self._text += part
            if kind == "reasoning":
                events.append(self.event("response.reasoning_text.delta", **self._place, delta=part))
            else:
                self._logprobs += logprobs
                events.append(self.event("response.output_text.delta", **self._place, delta=part, logprobs=logprobs))
                logprobs = []
        if piece.end and not self.items and self._kind is None:  # it says nothing, and that in a message
            events += self._open("message")
        return [*events, *(self.close() if piece.end else ())]

    def close(self) -> list[dict[str, Any]]:
        """Ends the item that is open."""
        if self._kind is None:
            return []
        place, part = self._place, self._part()
        item = self._item("completed", [part])
        self.items.append(item)
        events = []
        if self._kind == "message":
            done = {"text": self._text, "logprobs": part["logprobs"]}
            events.append(self.event("response.output_text.done", **place, **done))
            events.append(self.event("response.content_part.done", **place, part=part))
        else:
            events.append(self.event("response.reasoning_text.done", **place, text=self._text))
        events.append(self.event("response.output_item.done", output_index=place["output_index"], item=item))
        self._kind = None
        return events

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": len(self.items), "content_index": 0}

    @property
    def _id(self) -> str:
        prefix = {"message": "msg", "reasoning": "rs", None: "fc"}[self._kind]
        return f"{prefix}_{self._number}_{len(self.items)}"

    def _open(self, kind: str) -> list[dict[str, Any]]:
        self._kind, self._text, self._logprobs = kind, "", []
        item, place = self._item("in_progress", []), self._place
        events = [self.event("response.output_item.added", output_index=place["output_index"], item=item)]
        if kind == "message":
            events.append(self.event("response.content_part.added", **place, part=self._part()))
        return events

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        item = {"id": self._id, "type": self._kind, "status": status, "content": content}
        return item | ({"role": "assistant"} if self._kind == "message" else {"summary": []})

    def _part(self) -> dict[str, Any]:
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": list(self._logprobs)}

    def _call(self, call: ToolCall) -> list[dict[str, Any]]:
        at, number = len(self.items), self._id
        item = {"id": number, "type": "function_call", "status": "completed", "call_id": f"call_{number}"}
        item |= {"name": call.name, "arguments": call.arguments}
        started = item | {"status": "in_progress", "arguments": ""}
        self.items.append(item)
        said = {"item_id": number, "output_index": at}
        return [
            self.event("response.output_item.added", output_index=at, item=started),
            self.event("response.function_call_arguments.delta", **said, delta=call.arguments),
            self.event("response.function_call_arguments.done", **said, name=call.name, arguments=call.arguments),
            self.event("response.output_item.done", output_index=at, item=item),
        ]
