"""What a profile is measured on: token ids, and which of them the model should predict."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text for calibration.

    Attributes:
        ids: Its tokens.
        scored: Which of them are predicted for the measurement: answers, say. Never the first. `None` scores all
            others.
        kind: What it tests, for people.
    """

    ids: Int[Tensor, " tokens"]
    scored: Bool[Tensor, " tokens"] | None = None
    kind: str = "text"

    def __post_init__(self) -> None:
        if self.scored is not None and (self.scored.shape != self.ids.shape or not bool(self.scored[1:].any())):
            raise ValueError(
                f"a prompt of {len(self.ids)} tokens scores {int(self.scored.sum())} of {len(self.scored)}: give a "
                "flag for each token, and set one behind the first"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> Int[Tensor, " targets"]:
        """Places of the tokens to predict; each is predicted by the query one place before."""
        if self.scored is None:
            return torch.arange(1, len(self.ids))
        return torch.nonzero(self.scored[1:])[:, 0] + 1


def evenly(targets: Int[Tensor, " targets"], most: int) -> Int[Tensor, " taken"]:
    """At most so many of the targets, at equal distances, the last among them."""
    step = max(1, -(-len(targets) // most))
    return targets.flip(0)[::step].flip(0)


def as_prompts(inputs: Any, windows: Sequence[int] = (), sink: int = 0) -> list[Prompt]:
    """Makes prompts of what a caller has: prompts, sequences of token ids, or a tensor with a prompt a row.

    Raises:
        ValueError: There are none, or one is no longer than the widest window and the sink, so that restricting a
            head would change nothing.
    """
    prompts = [item if isinstance(item, Prompt) else Prompt(_ids(item)) for item in inputs]
    if not prompts:
        raise ValueError("there are no prompts: give some, for example calibration_prompts(tokenizer, length=4096)")
    short, reach = min(map(len, prompts)), max(windows, default=0) + sink
    if short <= reach:
        raise ValueError(
            f"a prompt has {short} tokens, and a window of {max(windows)} with a sink of {sink} hides nothing of it: "
            f"give prompts longer than {reach} tokens, or smaller windows"
        )
    return prompts


def held_apart(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to measure, and of every kind a quarter of them, one at least, to confirm a plan on.

    A kind of which there is only one prompt is measured, and with fewer than four prompts nothing is held out.
    """
    kinds: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        kinds.setdefault(prompt.kind, []).append(i)
    enough = len(prompts) >= 4
    held = {i for of in kinds.values() if enough and len(of) > 1 for i in of[3::4] or of[-1:]}
    return [p for i, p in enumerate(prompts) if i not in held], [p for i, p in enumerate(prompts) if i in held]


def halves(kinds: Sequence[str]) -> tuple[list[int], list[int]]:
    """Places of two halves of some prompts, of their kinds: each kind is dealt to both in turns.

    Halves of every second prompt would not be alike: calibration makes prompts of an even number of kinds, in turns.
    """
    firsts, seen, found = list(dict.fromkeys(kinds)), Counter[str](), ([], [])
    for place, kind in enumerate(kinds):
        found[(firsts.index(kind) + seen[kind]) % 2].append(place)
        seen[kind] += 1
    return found


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """A hash of the tokens and of which are scored, `sha256:` and 16 digits."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.ids.cpu().numpy().astype("<i8").tobytes())
        digest.update(prompt.targets.cpu().numpy().astype("<i8").tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _ids(item: Any) -> Int[Tensor, " tokens"]:
    ids = torch.as_tensor(item)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"a prompt is a tensor {list(ids.shape)} of {ids.dtype}: give one row of token ids each")
    return ids.long()
