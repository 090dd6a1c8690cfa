"""What a profile knows of every KV head, and the plans that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.plan import HeadPlan, HeadSpec

FORMAT, VERSION = "redknot-profile", 1
Number = int | float
Errors = Float[np.ndarray, "heads windows"]


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """The error that restricting each KV head causes, by window, and from it a plan for any budget.

    A plan is a prefix of moves: the moves (this head to that window) are sorted by their error and made one after
    another until the budget is met. So one bound holds for all heads, each local head has the smallest window that
    meets it, and a head is global when no window does.

    Attributes:
        method: How the errors were measured: "drift", "loss", "mass" or "gates".
        heads_by_layer: KV heads of each layer; heads are counted layer by layer.
        windows: Candidate windows in tokens, ascending.
        sink: Tokens that a local head keeps beside its window.
        errors: Error of every head at every window; it never grows with the window.
        halves: The same over two disjoint halves of the prompts.
        length: Tokens of the longest prompt; budgets are reckoned at this length.
        token_bytes: Bytes of one token's key and value in one KV head.
        target: The budget that the profile was asked for: what `plan()` without arguments makes.
        provenance: Model, calibration and cost, as JSON can hold it.
    """

    method: str
    heads_by_layer: tuple[int, ...]
    windows: tuple[int, ...]
    sink: int
    errors: Errors
    halves: tuple[Errors, Errors]
    length: int
    token_bytes: int
    target: Mapping[str, Number] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (sum(self.heads_by_layer), len(self.windows))
        for name, errors in (("errors", self.errors), *(("halves", half) for half in self.halves)):
            if errors.shape != shape:
                raise ValueError(f"{name} are {list(errors.shape)}: give a row for each of {shape[0]} heads")
            if not np.isfinite(errors).all():
                head = int(np.argwhere(~np.isfinite(errors))[0][0])
                raise ValueError(f"the {self.method} of head {head} is {errors[head]}: it must be finite")
        object.__setattr__(self, "errors", _falling(self.errors))
        object.__setattr__(self, "halves", tuple(map(_falling, self.halves)))

    def plan(
        self,
        *,
        budget: Number | None = None,
        global_ratio: Number | None = None,
        bytes_per_token: Number | None = None,
        max_error: Number | None = None,
    ) -> HeadPlan:
        """Makes the plan for one of these bounds, or for what the profile was asked for.

        Args:
            budget: Share of the dense cache's bytes, 0 to 1, to keep of a sequence of `length` tokens, at most.
            global_ratio: Share of the KV heads that are global, exactly `round(ratio * heads)`.
            bytes_per_token: Bytes a token to keep of a sequence of `length` tokens, all heads together, at most.
            max_error: Error that no restricted head exceeds, in the unit of the method.

        Raises:
            ValueError: Not exactly one bound is given, or no plan meets it.
        """
        given = {"budget": budget, "global_ratio": global_ratio}
        given |= {"bytes_per_token": bytes_per_token, "max_error": max_error}
        given = {name: bound for name, bound in given.items() if bound is not None} or dict(self.target)
        check_target(given)
        order = self._moves(self.errors)
        made = self._made(self.errors, order, given)
        measured = float(self.errors[order[made - 1]]) if made else 0.0
        return self._plan_of(order[:made], {**given, self.method: round(measured, 6)})

    def overlap(self, **bound: Number) -> float:
        """Overlap (Jaccard) of the global heads that each half of the prompts would choose; arguments as `plan`.

        1 where both halves choose the same heads, or none.
        """
        first, second = (self._global(half, bound or dict(self.target)) for half in self.halves)
        return len(first & second) / len(first | second) if first | second else 1.0

    def table(self, window: int | None = None) -> list[Float[np.ndarray, " heads"]]:
        """Errors at one window, by default the widest, an array for each layer."""
        column = len(self.windows) - 1 if window is None else self.windows.index(window)
        return np.split(self.errors[:, column], np.cumsum(self.heads_by_layer)[:-1])

    def save(self, path: AnyPath) -> None:
        """Writes the profile as JSON."""
        data = {"format": FORMAT, "version": VERSION, "method": self.method, "heads_by_layer": self.heads_by_layer}
        data |= {"windows": self.windows, "sink": self.sink, "length": self.length, "token_bytes": self.token_bytes}
        data |= {"target": dict(self.target), "provenance": dict(self.provenance)}
        data |= {"errors": _digits(self.errors), "halves": [_digits(half) for half in self.halves]}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry, allow_nan=False)}" for key, entry in data.items())
        Path(path).write_text("{\n" + lines + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: AnyPath) -> HeadProfile:
        """Loads what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is of another format or version, or damaged.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            found = data.get("format"), data.get("version")
        except (ValueError, AttributeError) as e:
            raise ValueError(f"{path}: is no profile ({e}); write it again with HeadProfile.save") from e
        if found != (FORMAT, VERSION):
            raise ValueError(f"{path}: has format {found}, not {(FORMAT, VERSION)}; give a file of HeadProfile.save")
        try:
            errors, halves = np.array(data["errors"]), tuple(np.array(half) for half in data["halves"])
            data = {key: data[key] for key in data if key not in ("format", "version", "errors", "halves")}
            data |= {name: tuple(data[name]) for name in ("heads_by_layer", "windows")}
            return cls(**data, errors=errors, halves=(halves[0], halves[1]))
        except (KeyError, TypeError, IndexError) as e:
            raise ValueError(f"{path}: is damaged ({type(e).__name__}: {e}); profile again") from e

    def __str__(self) -> str:
        heads = f"{len(self.heads_by_layer)} layers, {len(self.errors)} KV heads"
        found = f"HeadProfile({self.method}: {heads}, windows {', '.join(map(str, self.windows))}, sink {self.sink})"
        return f"{found}\n{self.plan()}" if self.target else found

    def _moves(self, errors: Errors) -> list[tuple[int, int]]:
        """(head, window) pairs by rising error; among equals wide windows come first, as each head must go."""
        heads, columns = np.indices(errors.shape)
        order = np.lexsort((heads.ravel(), -columns.ravel(), errors.ravel()))
        return [divmod(int(i), len(self.windows)) for i in order]

    def _made(self, errors: Errors, order: list[tuple[int, int]], bound: Mapping[str, Number]) -> int:
        """How many of the moves the bound asks for, or allows."""
        ((name, value),) = bound.items()
        if name == "max_error":
            return int(sum(errors[move] <= value for move in order))
        heads = len(self.errors)
        if name == "global_ratio":
            wanted = heads - round(value * heads)
            left = np.cumsum([column == len(self.windows) - 1 for _, column in order])
            return int(np.searchsorted(left, wanted)) + 1 if wanted else 0
        kept = {c: HeadSpec(window, self.sink).kept(self.length) for c, window in enumerate(self.windows)}
        held = np.full(heads, self.length)
        allowed = value * heads * self.length if name == "budget" else value * self.length / self.token_bytes
        if held.sum() <= allowed:
            return 0
        for made, (head, column) in enumerate(order, 1):
            held[head] = kept[column]
            if held.sum() <= allowed:
                return made
        least = held.sum() * (self.token_bytes / self.length if name == "bytes_per_token" else 1 / heads / self.length)
        raise ValueError(
            f"{name}={value} is impossible: with every head local to {self.windows[0]} + {self.sink} tokens, a "
            f"sequence of {self.length} tokens keeps {least:.4g}. Give more, or smaller windows."
        )

    def _plan_of(self, moves: Iterable[tuple[int, int]], choice: Mapping[str, Number]) -> HeadPlan:
        specs = [HeadSpec()] * len(self.errors)
        for head, column in moves:
            specs[head] = HeadSpec(self.windows[column], self.sink)
        ends = np.cumsum((0, *self.heads_by_layer))
        layers = tuple(tuple(specs[a:b]) for a, b in pairwise(ends))
        return HeadPlan(layers, provenance={**self.provenance, "method": self.method, **choice})

    def _global(self, errors: Errors, bound: Mapping[str, Number]) -> set[int]:
        check_target(bound)
        order = self._moves(errors)
        left = {head for head, _ in order[: self._made(errors, order, bound)]}
        return set(range(len(errors))) - left


def check_target(bound: Mapping[str, Number]) -> None:
    """Checks that there is exactly one bound, and that it can be met at all.

    Raises:
        ValueError: There is none or several, or a number is out of range.
    """
    if len(bound) != 1:
        names = "budget, global_ratio, bytes_per_token and max_error"
        raise ValueError(f"{dict(bound) or 'no bound'} is given: give exactly one of {names}, such as budget=0.25")
    ((name, value),) = bound.items()
    top = 1 if name in ("budget", "global_ratio") else np.inf
    if not (0 <= value <= top) or (value == 0 and name in ("budget", "bytes_per_token")):
        raise ValueError(f"{name} is {value}: give a {'share from 0 to 1' if top == 1 else 'number above 0'}")


def _digits(errors: Errors) -> list[list[float]]:
    return [[float(f"{error:.6g}") for error in row] for row in errors]


def _falling(errors: Errors) -> Errors:
    """A wider window keeps all that a smaller one keeps; noise must not say otherwise."""
    return np.maximum.accumulate(errors[:, ::-1], axis=1)[:, ::-1]
