"""Key-value retrieval (Liu et al. 2023, "Lost in the middle"): a JSON object of UUIDs, one of which is asked for."""

import json

import numpy as np

from evals.task import Example
from evals.tasks.generated import Generated
from evals.tasks.vocabulary import distinct, uuid4

NAMES = ("key_value",)
PARTS = 5


def pairs(rng: np.random.Generator, index: int, size: int, length: int) -> Example:
    """See `Draw`: the size counts pairs. The pair asked for lies in each fifth of them in turn."""
    drawn = distinct(rng, uuid4, 2 * size)
    keys, values = drawn[:size], drawn[size:]
    part = index % PARTS
    low = part * size // PARTS
    asked = int(rng.integers(low, max(low + 1, (part + 1) * size // PARTS)))
    held = json.dumps(dict(zip(keys, values, strict=True)), indent=0)
    return Example(
        id="",
        context="Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f"JSON data:\n{held}\n\n",
        question=f'Key: "{keys[asked]}"\n',
        answers=(values[asked],),
        max_new_tokens=48,
        answer_prefix="Corresponding value:",
        kind=f"fifth {part + 1}",
    )


def load(name: str, source: str | None) -> Generated:
    """Return the task, which takes no source."""
    if source is not None:
        raise ValueError(f"{name} makes its own texts and takes no source, not {source!r}")
    return Generated(name, "string_match_part", pairs, smallest=PARTS)
