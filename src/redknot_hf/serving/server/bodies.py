"""What clients send, field by field; a field that is not here, or that would be ignored, is refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from .errors import RequestError

Id = Annotated[int, Field(ge=0, le=1 << 31)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=16)]


def _sayable(given: Any) -> Any:
    """What is said back to clients must be JSON; Python's parser lets more by."""
    try:
        json.dumps(given, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise ValueError("it holds what is no JSON: NaN, an infinity, half a letter, or far too many levels") from e
    return given


Amount = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] | Literal["all"]


class Body(BaseModel):
    """Numbers are numbers, and nothing is let by that nobody reads."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What is sent beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    """Free text is all that there is."""

    type: Literal["text"]


class Asked(Body):
    """How an answer is chosen, whatever the route; what is left out is as the model's `generation_config` has it."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    # Documents that stand before the prompt: addresses, texts or ids; and what of them is recomputed there.
    segments: Annotated[list[str | list[Id]], Field(max_length=1024)] | None = None
    boundary: Amount | list[Amount] | None = None
    # Of no consequence for an answer.
    user: str | None = None
    metadata: Annotated[dict[str, Any], AfterValidator(_sayable)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class CompletionBody(Asked):
    """Of `/v1/completions`."""

    prompt: str | list[Id] | list[str] | list[list[Id]]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class SegmentBody(Body):
    """Of `/v1/segments`."""

    input: str | list[Id] | list[str] | list[list[Id]]
    prefix: str | list[Id] | None = None
    model: str | None = None


class Part(Body):
    """A piece of a message; text is all that a language model reads."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "input_text", "output_text"]
    text: str


Content = str | list[Part] | None


class Called(Body):
    """A function and what it is called with."""

    name: str
    arguments: str | dict[str, Any]


class Call(Body):
    """That an assistant has called a function."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What answers have and clients send back as it was.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Body):
    """What a model may call."""

    model_config = ConfigDict(extra="allow")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Body):
    """A function, as chat has it."""

    type: Literal["function"]
    function: Function


class ChatBody(Asked):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], BeforeValidator(_sayable)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None


class FlatTool(Function):
    """A function, as responses have it."""

    type: Literal["function"]


class Reasoning(Body):
    """How much a model thinks, if its template asks."""

    effort: str | None = None
    summary: None = None


class TextOptions(Body):
    """Of the text."""

    format: TextFormat | None = None


class ResponseBody(Asked):
    """Of `/v1/responses`; nothing is stored here, so that a conversation is sent anew each time."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    tools: Annotated[list[FlatTool], BeforeValidator(_sayable)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    chat_template_kwargs: dict[str, Any] | None = None


def listed(given: str | Sequence[Any], name: str) -> list[Any]:
    """One or more texts, or lists of ids.

    Raises:
        RequestError: There are none.
    """
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise RequestError(400, f"the {name} is empty: give a text, ids, or a list of either", param=name)
    return list(given)
