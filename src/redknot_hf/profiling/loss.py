"""Loss: which heads can be restricted together before the model's predictions move."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from redknot_hf.plan.plan import HeadPlan, HeadSpec

from .divergence import Divergence
from .drift import drift, measure_drift
from .holders import Holders
from .prompt import Prompt, halves
from .search import Path, find_path, measure_path, refine

_POINTS = 16  # of the joint path at which the error is measured; half as many for the narrower windows
Table = Float[np.ndarray, "heads windows"]


class LossSearch:
    """Searches for heads that can be restricted together, on two halves of the prompts, and joins what it finds.

    Args:
        model: The model.
        prompts: Two or more.
        windows: Candidate windows, ascending.
        sink: First tokens that local heads keep.
        tick: Called with the forward passes done so far.

    Attributes:
        finished: Whether `run` and `refined` had the time that they needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Prompt],
        windows: Sequence[int],
        sink: int,
        tick: Callable[[int], object],
    ) -> None:
        self.model, self.windows, self.sink, self.tick = model, windows, sink, tick
        sums = measure_drift(model, prompts, [HeadSpec(window, sink) for window in windows], lambda: False)
        self.holders = Holders.of(model.config)
        self.drifts = self.holders.fold(drift(sums, [prompt.kind for prompt in prompts]) ** 2) ** 0.5
        self.divergence = Divergence(model, prompts)
        self.until: float | None = None
        self.finished = False

    def run(self, seconds: float | int | None = None) -> tuple[Table, tuple[Table, Table]]:
        """Returns the errors of all heads at all windows, and those of either half.

        An error is the KL divergence, in nats a scored token, when this head and all with a lower one are restricted.
        Each half of the prompts finds its own path for the widest window; the two orders are joined by rank and the
        joint path is measured on all prompts. Narrower windows take the order that the drift's growth makes of it,
        and are measured too.

        Args:
            seconds: Time for the search, `refined` included: it may take longer by the joint path.
        """
        self.until = None if seconds is None else time.perf_counter() + seconds
        each_half = halves([prompt.kind for prompt in self.divergence.prompts])
        prior = np.argsort(self.drifts[:, -1], kind="stable").tolist()
        each = None if seconds is None else 0.35 * seconds  # the rest is for the joint path and for `refined`
        spec = HeadSpec(self.windows[-1], self.sink)
        paths = [
            find_path(
                self._measure(-1, half), prior, each, lambda h, c=half: self.divergence.settle(self.plan(h, spec), c)
            )
            for half in each_half
        ]
        self.divergence.settled = None
        self.finished = all(path.finished for path in paths)
        growth = self.drifts / self.drifts[:, -1:].clip(np.finfo(float).tiny)
        rank = sum(np.argsort(path.heads, kind="stable") for path in paths)
        joint = self._errors(measure_path(self._measure(-1), np.argsort(rank, kind="stable").tolist(), _POINTS))
        table = [joint]
        for column in reversed(range(len(self.windows) - 1)):
            order = np.argsort(joint * growth[:, column], kind="stable").tolist()
            table.insert(0, self._errors(measure_path(self._measure(column), order, _POINTS // 2)))
        first, second = (self._errors(path)[:, None] * growth for path in paths)
        return np.stack(table, 1), (first, second)

    def refined(self, errors: Table, plan: HeadPlan) -> Table:
        """Returns errors whose plan for the same budget has swapped local and global heads where that lowers the KL.

        The swapped heads swap their errors, so plans for other budgets change little. It takes what `run` left of its
        time.
        """
        specs = [spec for layer in plan for spec in layer]
        order = np.argsort(errors[:, -1], kind="stable").tolist()
        local = [head for head in order if not specs[head].is_global]
        rest = [head for head in order if specs[head].is_global]
        left = None if self.until is None else self.until - time.perf_counter()
        swapped = refine(self._measure(-1), local, rest, left)
        self.finished &= self.until is None or time.perf_counter() < self.until
        errors = errors.copy()
        into, out = [h for h in swapped if h not in local], [h for h in local if h not in swapped]
        errors[into + out] = errors[out + into]
        return errors

    def _measure(self, column: int, chosen: Sequence[int] | None = None) -> Callable[[Sequence[int]], float]:
        """The error, on some of the prompts, of restricting heads to one window."""
        spec = HeadSpec(self.windows[column], self.sink)

        def measure(heads: Sequence[int]) -> float:
            found = float(self.divergence(self.plan(heads, spec), chosen).mean())
            self.tick(self.divergence.measured)
            return found

        return measure

    def plan(self, local: Sequence[int], spec: HeadSpec) -> HeadPlan:
        """The plan that restricts these of the heads that hold keys, counted layer by layer."""
        specs = [HeadSpec()] * len(self.drifts)
        for head in local:
            specs[head] = spec
        return self.holders.plan(specs)

    def _errors(self, path: Path) -> Float[np.ndarray, " heads"]:
        found = np.zeros(len(self.drifts))
        found[path.heads] = path.errors
        return found
