"""Committing a step: its new tokens are written to the rows and attended, in one go where the step is short."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from redknot_kernels import read_context
from torch import Tensor

from .handle import Run, Step

Query = Float[Tensor, "batch query_heads tokens key_dim"]
Output = Float[Tensor, "batch tokens query_heads value_dim"]
Real = Bool[Tensor, "batch tokens"]


def write(step: Step, real: Real | None) -> None:
    """Writes a step's tokens to the rows; `real` says which are no padding. A second call changes nothing."""
    if step.written:
        return
    layer = step.layer
    rows, pool = layer.storage()
    counts = _counts(step, real)
    with pool.lock:
        layer.bring_back()
        layer.reserve(rows.lengths + counts)
        on_device = layer.on_device()
        for run in runs(step, real):
            key, value = run.take(step.key), run.take(step.value)
            part = on_device.table[run.sequences], on_device.counts[:-1][run.sequences]
            if key.shape[2] > layer.page_size and rows.lengths[run.sequences][0] > 0:
                past = int(rows.lengths[run.sequences][0])
                run.context = read_context(pool.pages, part[0], past, rows.rules)
            layer.kernels.append(pool.pages, key, value, *part, rows.rules)
            step.runs.append(run)
        layer.advance(step, counts, real)
        layer.on_device()  # a captured step may be next


def write_and_attend(query: Query, step: Step, real: Real | None, options: dict[str, Any]) -> Output:
    """Writes a step of at most a page and attends it, by one call of the kernels."""
    layer = step.layer
    rows, pool = layer.storage()
    counts = _counts(step, real)
    with pool.lock:
        layer.bring_back()
        layer.reserve(rows.lengths + counts)
        if real is None and step.tokens == 1 and (views := layer.views()):
            assert layer.kernels.step_in_views is not None
            out = layer.kernels.step_in_views(
                query, step.key, step.value, views, int(rows.lengths[0]), rows.rules, **options
            )
            layer.advance(step, counts, real)
            return out
        on_device = layer.on_device()
        out = layer.kernels.step(
            query, pool.pages, step.key, step.value, on_device.table, on_device.counts, real, rows.rules,
            **options,
        )  # fmt: skip
        layer.advance(step, counts, real)
        on_device.advanced(rows, layer.slots)
    return out


def captured(query: Query, step: Step, mask: Tensor | None, options: dict[str, Any]) -> Output:
    """What `write_and_attend` does, inside of `torch.compile`: the device counts, and the host will ask it.

    What another layer has written already, of the same keys, is attended as it is.
    """
    layer = step.layer
    pool, on_device, run = layer.pool, layer.rows_on_device, layer.kernels.captured
    assert pool is not None and run is not None  # noqa: PT018 - `layer.captures` has said so
    new = (None, None) if step.written else (step.key, step.value)
    real = None if mask is None else mask[:, 0, 0]
    step.written = True
    return run(
        query, *pool.pages, *new, on_device.table, on_device.counts, real, on_device.bounds,
        on_device.most_kept, layer.rules.reach, options["scale"], options["softcap"], options["s_aux"],
    )  # fmt: skip


def runs(step: Step, real: Real | None) -> list[Run]:
    """Which tokens of a step are attended together."""
    rows, _ = step.layer.storage()
    level = len(set(rows.lengths.tolist())) == 1
    if real is None and (level or step.tokens <= step.layer.page_size):
        return [Run(slice(0, rows.batch), None)]
    indices = [None] * rows.batch if real is None else [r.nonzero()[:, 0] for r in real]
    return [Run(slice(b, b + 1), i) for b, i in enumerate(indices) if i is None or len(i)]


def _counts(step: Step, real: Real | None) -> np.ndarray:
    rows, _ = step.layer.storage()
    return _all_real(rows.batch, step.tokens) if real is None else real.sum(1).cpu().numpy()


@lru_cache(maxsize=256)
def _all_real(batch: int, tokens: int) -> np.ndarray:
    return np.full(batch, tokens)
