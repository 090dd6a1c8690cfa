"""What is refused at once: arguments that mean nothing, and requests that could never be served."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from redknot_hf.cache.takeover import switch_of
from redknot_hf.reuse.schedule import Boundary, Reused

from .documents import Documents, Named
from .request import Sampling

if TYPE_CHECKING:
    from .engine import Engine

PREEMPT = ("swap", "recompute", None)


def store_of(engine: Engine) -> Documents:
    """What an engine has stored.

    Raises:
        ValueError: It has no store.
    """
    if engine.documents is None:
        raise ValueError("the engine has no store: make it Engine(..., store=SegmentStore(model, plan))")
    return engine.documents


def ids_of(prompt: Sequence[int] | str, engine: Engine, first: bool) -> list[int]:
    """Ids of a prompt.

    Args:
        prompt: Ids, or text.
        engine: Whose tokenizer reads texts.
        first: Nothing stands before it.

    Raises:
        ValueError: It is text, and the engine has no tokenizer.
        TypeError: It is neither.
    """
    if isinstance(prompt, str):
        if engine.tokenizer is None:
            raise ValueError("the prompt is text: give ids, or make the engine with a tokenizer")
        return list(engine.tokenizer(prompt, add_special_tokens=first)["input_ids"])
    try:
        return [index(i) for i in prompt]
    except TypeError as e:
        raise TypeError(
            "the prompt is neither a text nor the ids of one: give a str, or a flat list as "
            'tokenizer(text)["input_ids"] is one'
        ) from e


def scheduled(segments: Sequence[Named], boundary: Boundary | None, source: Any, engine: Engine) -> tuple[Reused, ...]:
    """How the segments that a request names will stand in its prompt.

    Raises:
        ValueError: There is no store or no such segment, or the request begins with a span already.
    """
    if not len(segments):
        if boundary is not None:
            raise ValueError(f"boundary={boundary!r} without segments: name some, or leave it out")
        return ()
    if source is not None:
        raise ValueError("a request begins with segments or with a span, source=: give one of them")
    return store_of(engine).schedule(segments, boundary)


def check_request(
    ids: Sequence[int], sampling: Sampling, n: int, engine: Engine, segments: Sequence[Reused] = ()
) -> None:
    """Checks a request.

    Args:
        ids: Of its prompt, without those of segments before it.
        sampling, n, engine: What is asked of whom.
        segments: Before the prompt.

    Raises:
        ValueError: The engine can never serve it; says what it needs and what there is.
    """
    if n < 1:
        raise ValueError(f"n={n}: ask for one answer at least")
    if not ids:
        raise ValueError("the prompt is empty: give one token at least")
    for part in (ids, *(segment.ref.ids for segment in segments)):
        if not 0 <= min(part) <= max(part) < engine.words:
            raise ValueError(
                f"the prompt has ids from {min(part)} to {max(part)}: the model knows 0 to {engine.words - 1}"
            )
    if other := [i for i in sampling.logit_bias if not 0 <= i < engine.words]:
        raise ValueError(f"logit_bias of token {other[0]}: the model knows 0 to {engine.words - 1}")
    if sampling.stop and engine.tokenizer is None:
        raise ValueError("stop strings need a tokenizer: make the engine with one, or give stop_ids")
    tokens = len(ids) + sum(len(segment.ref) for segment in segments)
    longest = tokens + sampling.max_new_tokens - 1
    if longest > engine.max_len:
        raise ValueError(
            f"{tokens} tokens of prompt and {sampling.max_new_tokens} new ones are more than max_len="
            f"{engine.max_len}: shorten the prompt, or lower max_new_tokens"
        )
    if not engine.memory.ever_fits(longest):
        raise ValueError(
            f"{tokens} tokens of prompt and {sampling.max_new_tokens} new ones need "
            f"{engine.memory.needs(longest):,} bytes of pages, and the engine has "
            f"{engine.memory.used()['total']:,} in all, for {engine.memory.longest:,} tokens: shorten the prompt, "
            "lower max_new_tokens, or give the engine more memory"
        )


def check_answered(answered: Sequence[int], sampling: Sampling, n: int, words: int) -> list[int]:
    """Checks the beginning of an answer that is to go on, and gives its ids.

    Raises:
        ValueError: It is longer than the answer may be, of several, or no text of the model's.
        TypeError: It is no ids.
    """
    try:
        answered = [index(i) for i in answered]
    except TypeError as e:
        raise TypeError("answered is not ids: give the .ids of the request that is to go on") from e
    if not answered:
        return []
    if n > 1:
        raise ValueError(f"answered is the beginning of one answer, and n={n}: ask for each by itself")
    if len(answered) > sampling.max_new_tokens:
        raise ValueError(
            f"{len(answered)} tokens were answered, more than max_new_tokens={sampling.max_new_tokens}, which counts "
            "them: raise it"
        )
    if not 0 <= min(answered) <= max(answered) < words:
        raise ValueError(f"answered has ids from {min(answered)} to {max(answered)}: the model knows 0 to {words - 1}")
    return answered


def check_arguments(
    config: Any, longest: int, counts: tuple[int, ...], preempt: str | None, parked: float | int
) -> None:
    """Checks the arguments of an engine.

    Raises:
        ValueError: One is off, or the model cannot be served with it.
    """
    if longest < 1:
        raise ValueError(f"max_len={longest}: say how many tokens a prompt and its answer may have")
    for name, value in zip(("max_batch", "chunk", "park_every", "queue"), counts, strict=True):
        if value < 1:
            raise ValueError(f"{name}={value}: give a number from 1 on")
    if preempt not in PREEMPT:
        raise ValueError(f"preempt={preempt!r}: choose one of {PREEMPT}")
    if not 0 <= parked <= 1:
        raise ValueError(f"parked={parked}: give a share of the pages, 0 to 1")
    switch = switch_of(config)
    if switch is not None and longest > switch:
        raise ValueError(
            f"{config.model_type} turns keys by other frequencies in texts of more than {switch} tokens, so sequences "
            f"of different length cannot share a batch: pass max_len={switch} or less"
        )
