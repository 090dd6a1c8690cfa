"""What would put a cache aside or read past what it holds, behind its owner's back, refused before anything has run.

Models and wrappers may replace the cache that `generate` was given by one of their own: then answers are dense, memory
grows, and the plan does nothing. The cache itself is not told, but `generate` marks it as the caller's own before it
runs the model, and the call's frame says then what is about to happen.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FrameType
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from redknot_hf.plan.plan import HeadPlan, HeadSpec

# Models whose `prepare_inputs_for_generation` drops a cache of at most `original_max_position_embeddings` slots once
# the text is longer than that: longrope turns keys by other frequencies from there on.
_SWITCHING = ("phi3", "phimoe", "phi4_multimodal")


@dataclass(frozen=True)
class Call:
    """A call of `generate`.

    Attributes:
        model: What runs.
        asked: Its options.
        tokens: Ids of each sequence that were passed.
        described: Slots that its attention mask speaks of.
    """

    model: Any
    asked: GenerationConfig
    tokens: int
    described: int


def call_of(frame: FrameType | None) -> Call | None:
    """The call of `generate` in whose course a frame runs; `None` if there is none."""
    while frame is not None:
        names = frame.f_locals
        if (
            frame.f_code.co_name == "generate"
            and {"self", "generation_config", "input_ids", "model_kwargs"} <= names.keys()
        ):
            tokens, mask = names["input_ids"].shape[1], names["model_kwargs"].get("attention_mask")
            described = tokens if mask is None else mask.shape[-1]
            return Call(names["self"], names["generation_config"], tokens, described)
        frame = frame.f_back
    return None


def switch_of(config: PreTrainedConfig) -> int | None:
    """Slots from which on the model wants keys turned by other frequencies, and drops a cache that holds fewer."""
    return getattr(config, "original_max_position_embeddings", None) if config.model_type in _SWITCHING else None


def refuse_takeover(call: Call, plan: HeadPlan, switch: int | None, slots: int) -> None:
    """Checks that a call goes on from what the cache holds, and uses that cache from the first token to the last.

    Args:
        plan: The cache's.
        switch: See `switch_of`.
        slots: What the cache holds.

    Raises:
        ValueError: It does not.
    """
    owner = getattr(call.model.prepare_inputs_for_generation, "__self__", call.model)  # PEFT puts its own there
    refuse_prefix(owner)
    scale = call.asked.guidance_scale
    if scale not in (None, 1) and any(spec != HeadSpec() for layer in plan for spec in layer):
        raise ValueError(
            f"guidance_scale={scale}: transformers reads the unconditional branch into a DynamicCache of its own, so "
            "half of every score would not follow the plan. Pass logits_processor=redknot_hf.guidance(model, "
            f"{scale}, RedKnotCache(...)) in its place."
        )
    if 0 < call.tokens <= slots and call.described <= call.tokens:
        raise ValueError(
            f"input_ids has {call.tokens} tokens, and the cache holds {slots}: `generate` skips what the cache holds, "
            "so nothing is left to read. Pass the whole text, what the cache holds and what follows it, or the new "
            f"tokens with an attention_mask of all {slots + call.tokens} slots; to ask a text again, ask a fork "
            "that was made before the first answer."
        )
    if switch is not None:
        _refuse_switch(call, switch, slots)


def refuse_prefix(model: Any) -> None:
    """Checks that a model is not wrapped by a method of PEFT that passes a cache of its own.

    Raises:
        ValueError: It is.
    """
    method = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if method in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            f"PEFT's {getattr(method, 'value', method)!s} passes the model a DynamicCache that holds the learnt "
            "prefix, in place of the cache that it is given. Leave that out, or use an adapter that "
            "learns no keys (LoRA, say)."
        )


def _refuse_switch(call: Call, switch: int, slots: int) -> None:
    kind = call.model.config.model_type
    begins = (
        f"{kind} turns keys by other frequencies once a text is longer than original_max_position_embeddings={switch} "
        "tokens, and transformers then goes on with a DynamicCache of its own"
    )
    if 0 < slots <= switch < call.tokens and not call.asked.prefill_chunk_size:
        raise ValueError(
            f"{begins}. The cache holds {slots} tokens of {call.tokens}: pass the whole text with a new cache, or "
            "call cache.reset() first."
        )
    last = call.asked.max_length - 1  # the last token of all is not read
    if call.tokens <= switch < last:
        raise ValueError(
            f"{begins}. A text of {call.tokens} tokens may grow by {switch - call.tokens + 1}, and "
            f"{call.asked.max_length - call.tokens} are asked for: lower max_new_tokens, or pass more than {switch} "
            "tokens at once."
        )
