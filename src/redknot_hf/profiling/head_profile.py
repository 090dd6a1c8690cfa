"""What a profile knows of every KV head, and the plans that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.plan import HeadPlan, HeadSpec

from . import profile_file
from .allocation import allocate, steps
from .choices import Errors, falling, name_of
from .holders import Holders

Number = int | float
Options = Float[np.ndarray, "heads options"]  # the choices, and last to keep everything
Picks = Int[np.ndarray, " heads"]

# What errors of a method add up as: those of drift are lengths of vectors, whose squares add up.
_POWER = {"drift": 2}
_SHOWN = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)  # shares of the bytes at which a profile prints its curve


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """The error that each choice causes in each KV head, and from it a plan for any budget.

    A choice is a `HeadSpec`: a window, or everything in a storage of fewer bits. Whatever is measured, a head may also
    keep everything as it is, at no error. For a budget of bytes the heads take the choices whose errors sum up to the
    least.

    Attributes:
        method: How the errors were measured: "drift", "fisher", "loss", "mass" or "gates".
        heads_by_layer: KV heads of each layer.
        choices: What a head may keep short of everything, the cheapest first.
        errors: Error of every head that holds keys, counted layer by layer, under every choice; none grows where a
            choice keeps more. What layers that share its keys lose counts with it.
        halves: The same over two disjoint halves of the prompts.
        length: Tokens of the longest prompt; budgets are reckoned at this length, unless another one is given.
        head_dims: Elements of a key and of a value, of each layer.
        itemsize: Bytes of an element in the model's dtype.
        target: The bound that the profile was asked for: what `plan()` without arguments makes.
        searched: The choice of every head, `len(choices)` for everything, that a search found for the target.
        provenance: Model, calibration and cost, as JSON can hold it.
        sources: The layer whose keys each layer attends, where some share those of others.
    """

    method: str
    heads_by_layer: tuple[int, ...]
    choices: tuple[HeadSpec, ...]
    errors: Errors
    halves: tuple[Errors, Errors]
    length: int
    head_dims: tuple[tuple[int, int], ...]
    itemsize: int
    target: Mapping[str, Number] = field(default_factory=dict)
    searched: tuple[int, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shape = (sum(self.holders.by_layer), len(self.choices))
        for name, errors in (("errors", self.errors), *(("halves", half) for half in self.halves)):
            if errors.shape != shape:
                raise ValueError(f"{name} are {list(errors.shape)}: give a row for each of {shape[0]} heads")
            if not np.isfinite(errors).all():
                head = int(np.argwhere(~np.isfinite(errors))[0][0])
                raise ValueError(f"the {self.method} of head {head} is {errors[head]}: it must be finite")
        if len(self.head_dims) != len(self.heads_by_layer):
            raise ValueError(f"head_dims are of {len(self.head_dims)} layers, of {len(self.heads_by_layer)}")
        object.__setattr__(self, "errors", falling(self.errors, self.choices))
        object.__setattr__(self, "halves", tuple(falling(half, self.choices) for half in self.halves))

    @property
    def holders(self) -> Holders:
        """The heads that hold keys."""
        layers = range(len(self.heads_by_layer))
        return Holders(self.heads_by_layer, tuple(layers) if self.sources is None else self.sources)

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows among the choices, ascending."""
        return tuple(sorted({spec.window for spec in self.choices if spec.window is not None}))

    def plan(
        self,
        *,
        budget: Number | None = None,
        global_ratio: Number | None = None,
        bytes_per_token: Number | None = None,
        max_error: Number | None = None,
        length: int | None = None,
    ) -> HeadPlan:
        """Makes the plan for one of these bounds, or for what the profile was asked for.

        Args:
            budget: Share of the dense cache's bytes, 0 to 1, to keep of a sequence of `length` tokens, at most.
            global_ratio: Share of the KV heads that are global, exactly `round(ratio * heads)`.
            bytes_per_token: Bytes a token to keep of a sequence of `length` tokens, all heads together, at most.
            max_error: Error that no head exceeds, in the unit of the method.
            length: Tokens of the sequences that will be served; by default those of the profile's longest prompt.

        Returns:
            The plan. What confirmed a plan for the profile's own target is in the provenance of that one only.

        Raises:
            ValueError: Not exactly one bound is given, or no plan meets it; the message says what is possible.
        """
        given = {"budget": budget, "global_ratio": global_ratio}
        given |= {"bytes_per_token": bytes_per_token, "max_error": max_error}
        given = {name: bound for name, bound in given.items() if bound is not None} or dict(self.target)
        check_target(given)
        length = self.length if length is None else length
        asked = given == dict(self.target) and length == self.length
        picks = self._picks(self.errors, given, length)
        if asked and self.searched is not None:
            picks = np.array(self.searched)
        provenance = {name: entry for name, entry in self.provenance.items() if asked or name != "held_out"}
        provenance |= {"overlap": round(self.overlap(**given, length=length), 4)}
        measured = self._all(self.errors)[np.arange(len(picks)), picks]
        provenance |= {"method": self.method, **given, "length": length, self.method: round(float(measured.max()), 6)}
        return self._plan_of(picks, provenance)

    def picks(self, *, length: int | None = None, **bound: Number) -> Picks:
        """The index of every head's choice, `len(choices)` for everything; arguments as `plan`."""
        return self._picks(self.errors, bound or dict(self.target), self.length if length is None else length)

    def costs(self, length: int | None = None) -> Options:
        """Bytes that every head keeps of a sequence under every choice, and last of everything."""
        return self._costs(self.length if length is None else length)

    def bytes_allowed(self) -> float:
        """Bytes that the target allows, all heads together, where it is one of bytes."""
        ((name, value),) = self.target.items()
        return float(value * (self.costs()[:, -1].sum() if name == "budget" else self.length))

    def overlap(self, *, length: int | None = None, **bound: Number) -> float:
        """Overlap (Jaccard) of the global heads that each half of the prompts would choose; arguments as `plan`.

        1 where both halves choose the same heads, or none.
        """
        given, length = bound or dict(self.target), self.length if length is None else length
        check_target(given)
        first, second = (
            {head for head, spec in enumerate(self._specs(self._picks(half, given, length))) if spec.is_global}
            for half in self.halves
        )
        return len(first & second) / len(first | second) if first | second else 1.0

    def curve(self, length: int | None = None) -> list[tuple[float, float]]:
        """Share of the dense bytes, and error in the method's unit, of the best plans: from all choices to none.

        Args:
            length: Tokens of the sequences that will be served.

        Returns:
            Pairs by rising share. The errors of drift are the root of their summed squares.
        """
        costs, errors = self._costs(self.length if length is None else length), self._weights(self.errors)
        picks, order = steps(costs, errors)
        heads = np.arange(len(costs))
        spent, error = costs[heads, picks].sum(), errors[heads, picks].sum()
        found = [(spent, error)]
        for step in order:
            spent, error = spent + step.cost, error - step.gain
            found.append((spent, error))
        dense, power = costs[:, -1].sum(), _POWER.get(self.method, 1)
        return [(float(bytes_ / dense), float(max(error, 0.0) ** (1 / power))) for bytes_, error in found]

    def table(self, window: int | HeadSpec | None = None) -> list[Float[np.ndarray, " heads"]]:
        """Errors under one choice, or at one window, by default the last; an array a layer, empty if it shares."""
        if isinstance(window, int):
            window = next(spec for spec in self.choices if spec.window == window)
        column = len(self.choices) - 1 if window is None else self.choices.index(window)
        return np.split(self.errors[:, column], np.cumsum(self.holders.by_layer)[:-1])

    def save(self, path: AnyPath) -> None:
        """Writes the profile as JSON."""
        profile_file.write(path, self)

    @classmethod
    def load(cls, path: AnyPath) -> HeadProfile:
        """Loads what `save` wrote, files of version 1 included.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is of another format or version, or damaged.
        """
        return profile_file.read(path, cls)

    def __str__(self) -> str:
        heads = f"{len(self.heads_by_layer)} layers, {len(self.errors)} KV heads"
        lines = [f"HeadProfile({self.method}: {heads}, choices {', '.join(map(name_of, self.choices))})"]
        shares, errors = zip(*self.curve(), strict=True)
        shown = [share for share in _SHOWN if share >= shares[0]]
        cells = [(f"{share:.0%}", f"{np.interp(share, shares, errors):.3g}") for share in shown]
        lines.append(
            f"bytes kept of {self.length} tokens, and {self.method} foretold (bytes from {shares[0]:.1%} on):"
        )
        lines += ["  " + "  ".join(f"{cell[row]:>7}" for cell in cells) for row in range(2)]
        return "\n".join([*lines, *([str(self.plan())] if self.target else [])])

    def _specs(self, picks: Picks) -> list[HeadSpec]:
        return [(*self.choices, HeadSpec())[pick] for pick in picks.tolist()]

    def _all(self, errors: Errors) -> Options:
        """The errors with a column more: everything is kept, and nothing goes wrong."""
        return np.concatenate([errors, np.zeros((len(errors), 1))], 1)

    def _weights(self, errors: Errors) -> Options:
        """The same, as they add up."""
        return self._all(errors) ** _POWER.get(self.method, 1)

    def _costs(self, length: int) -> Options:
        """Bytes that every head keeps under every choice, and last without a restriction."""
        if length < 1:
            raise ValueError(f"length is {length}: give the tokens of the sequences that will be served")
        rows = [
            [HeadPlan([[spec]]).nbytes(length, dims, self.itemsize) for spec in (*self.choices, HeadSpec())]
            for dims in self.head_dims
        ]
        return np.repeat(np.array(rows, dtype=float), self.holders.by_layer, axis=0)

    def _picks(self, errors: Errors, bound: Mapping[str, Number], length: int) -> Picks:
        """The choice of every head under a bound."""
        ((name, value),) = bound.items()
        costs = self._costs(length)
        if name == "max_error":
            return self._cheapest(errors, costs, value)
        if name == "global_ratio":
            return self._at_ratio(errors, costs, value)
        unit = costs[:, -1].sum() if name == "budget" else length
        try:
            return allocate(costs, self._weights(errors), float(value * unit))
        except ValueError as e:
            least = costs.min(1).sum() / unit
            raise ValueError(
                f"{name}={value} is impossible: with every head at {name_of(self.choices[0])}, a sequence of {length} "
                f"tokens keeps {least:.4g}. Give more, or smaller windows."
            ) from e

    def _cheapest(self, errors: Errors, costs: Options, most: Number) -> Picks:
        """The cheapest choice of every head that causes no more than this error."""
        return np.where(self._all(errors) <= most, costs, np.inf).argmin(1)

    def _at_ratio(self, errors: Errors, costs: Options, ratio: Number) -> Picks:
        """Heads whose best window does worst are global; one bound of error holds for the others."""
        local = np.array([i for i, spec in enumerate(self.choices) if not spec.is_global])
        best = errors[:, local].min(1)
        order = np.argsort(best, kind="stable")
        rest = order[: len(errors) - round(ratio * len(errors))]
        most = best[rest].max(initial=0.0)
        allowed = np.full(self._all(errors).shape, False)
        allowed[:, -1] = True
        allowed[rest] = False
        allowed[np.ix_(rest, local)] = errors[np.ix_(rest, local)] <= most
        return np.where(allowed, costs, np.inf).argmin(1)

    def _plan_of(self, picks: Picks, provenance: Mapping[str, Any]) -> HeadPlan:
        return self.holders.plan(self._specs(picks), provenance=provenance)


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
