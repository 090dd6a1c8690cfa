"""From what a client asks to a `Sampling`; what it leaves out is the model's own way, as in `generate`."""

from __future__ import annotations

from typing import Any

from redknot_hf.serving.request import Sampling

from .bodies import Asked
from .errors import RequestError

_GENERATION = ("top_k", "top_p", "min_p", "repetition_penalty")
_SAME = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos")


def model_defaults(config: Any) -> dict[str, Any]:
    """What a model's generation config says of sampling, as fields of `Sampling`."""
    found = {name: getattr(config, name, None) for name in _GENERATION}
    defaults = {name: value for name, value in found.items() if value is not None}
    if getattr(config, "do_sample", None):
        temperature = getattr(config, "temperature", None)
        defaults["temperature"] = 1.0 if temperature is None else temperature
    return defaults


def sampling_of(asked: Asked, defaults: dict[str, Any], new: int, logprobs: int | None) -> Sampling:
    """How one answer is chosen.

    Args:
        asked: By the client.
        defaults: Of the model.
        new: Tokens at most.
        logprobs: Of how many tokens, beside the chosen one; `None` of none.

    Raises:
        RequestError: A number is off.
    """
    told: dict[str, Any] = {name: getattr(asked, name) for name in (*_SAME, "temperature")}
    told = {name: value for name, value in told.items() if value is not None}
    if asked.top_k is not None:
        told["top_k"] = max(asked.top_k, 0)
    if asked.stop is not None:
        told["stop"] = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    if asked.stop_token_ids:
        told["stop_ids"] = tuple(asked.stop_token_ids)
    told["logit_bias"] = _biases(asked.logit_bias or {})
    try:
        return Sampling(**{**defaults, **told, "max_new_tokens": new, "logprobs": logprobs})
    except ValueError as e:
        raise RequestError(400, str(e), "invalid_value") from e


def _biases(given: dict[str, float]) -> dict[int, float | int]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError as e:
        raise RequestError(400, "logit_bias: give ids of tokens, as strings", "invalid_value", "logit_bias") from e
