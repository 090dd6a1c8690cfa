"""How long a prompt is, and the longest that fits."""

from collections.abc import Callable
from typing import Any

from evals.task import Example

# A prompt this near to the length asked for is full.
FULL = 0.98


def tokens(tokenizer: Any, text: str, special: bool = False) -> int:
    """Return the number of tokens of a text; `special` counts those that a tokenizer puts before every text."""
    return len(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def prompt_tokens(tokenizer: Any, example: Example) -> int:
    """Return the number of tokens of a prompt, whose documents (or context) and rest are tokenized apart."""
    first, *others = example.documents or (example.context,)
    parts = tokenizer(others, add_special_tokens=False, verbose=False)["input_ids"] if others else []
    rest = tokens(tokenizer, example.question + example.answer_prefix)
    return tokens(tokenizer, first, special=True) + sum(map(len, parts)) + rest


def fullest(
    build: Callable[[int], Example],
    tokenizer: Any,
    length: int,
    smallest: int,
    guess: int,
    largest: int | None = None,
) -> tuple[Example, int]:
    """Return an example whose prompt is as long as fits, and its size.

    Args:
        build: Makes the example of a size; prompts grow with it about linearly.
        tokenizer: Counts the tokens.
        length: Tokens of the prompt at most.
        smallest: The smallest size there is.
        guess: Where to begin the search: the fewer prompts are made and tokenized, the nearer it is.
        largest: The largest size there is; `None` if there is no end.

    Raises:
        ValueError: Even the smallest prompt is too long.
    """
    best = build(smallest)
    base = prompt_tokens(tokenizer, best)
    if base > length:
        raise ValueError(f"the shortest prompt of {best.id} has {base} tokens, length is {length}")
    fits, exceeds = smallest, None if largest is None else largest + 1
    size = max(guess, smallest + 1) if exceeds is None else min(max(guess, smallest + 1), exceeds - 1)
    while exceeds is None or fits + 1 < exceeds:
        example = build(size)
        used = prompt_tokens(tokenizer, example)
        if used > length:
            exceeds = size
        else:
            best, fits = example, size
            if used >= FULL * length:
                break
        # Along the line through the smallest and this size, to the middle of what is full.
        aimed = (1 + FULL) / 2 * length - base
        size = smallest + round((size - smallest) * aimed / max(1, used - base))
        size = max(size, fits + 1) if exceeds is None else min(max(size, fits + 1), exceeds - 1)
    return best, fits


def cut_middle(tokenizer: Any, text: str, length: int, special: bool = False) -> str:
    """Return a text of at most `length` tokens: its beginning and its end, as LongBench cuts what is too long.

    Raises:
        ValueError: The tokenizer does not tell which characters a token stands for.
    """
    if tokens(tokenizer, text, special) <= length:
        return text
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} tells no places of tokens: use a fast tokenizer")
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    kept = length
    while kept > 0:
        half = kept // 2
        cut = text[: spans[half][0]] + text[spans[half - kept][0] :]
        if (excess := tokens(tokenizer, cut, special) - length) <= 0:
            return cut
        kept -= excess
    raise ValueError(f"the question and its answer leave no room for the context: {length} tokens")
