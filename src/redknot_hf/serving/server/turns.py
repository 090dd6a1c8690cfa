"""The input of `/v1/responses` as the turns of a conversation."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from .bodies import Message, ResponseBody
from .errors import RequestError

_TEXT = ("text", "input_text", "output_text")


def turns_of(body: ResponseBody) -> list[Message]:
    """Turns: texts and messages as they are; thoughts go with the turn behind them, calls with the one before.

    Raises:
        RequestError: There is something else among them.
    """
    turns: list[dict[str, Any]] = []
    if body.instructions:
        turns.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str) or (body.input and body.input[0].get("type") in _TEXT):
        turns.append({"role": "user", "content": body.input})
    else:
        _add_items(turns, body.input)
    try:
        made = [Message.model_validate(turn) for turn in turns]
    except ValidationError as e:
        field = ".".join(map(str, e.errors()[0]["loc"]))[:80]
        raise RequestError(400, f"input: {field}: {e.errors()[0]['msg']}", "invalid_value", "input") from e
    if not made:
        raise RequestError(400, "the input is empty: give a text, or a list of messages", param="input")
    return made


def _add_items(turns: list[dict[str, Any]], items: list[dict[str, Any]]) -> None:
    thoughts: str | None = None
    for item in items:
        kind = item.get("type", "message")
        if kind == "reasoning":
            content = item.get("content") or []
            if not isinstance(content, list):
                raise RequestError(400, "input: the content of a reasoning is a list of texts", param="input")
            thoughts = "".join(str(x.get("text", "")) for x in content if isinstance(x, dict))
        elif kind == "message" and "role" in item:
            turn = {name: item[name] for name in ("role", "content") if name in item}
            turns.append(turn)
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "type": "function"}
            call["function"] = {name: item.get(name) for name in ("name", "arguments")}
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant"})
            turns[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        else:
            raise RequestError(400, "input: an item is no message, reasoning or call of a function", param="input")
        if thoughts is not None and turns and turns[-1]["role"] == "assistant" and kind != "reasoning":
            turns[-1]["reasoning_content"], thoughts = thoughts, None
