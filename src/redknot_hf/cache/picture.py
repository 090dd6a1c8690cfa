"""What `print(cache)` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from redknot_hf.plan.spec import HeadSpec


def picture(heads: Sequence[HeadSpec], tokens: int, batch: int, held: Mapping[str, int], dense: int) -> str:
    """A line on what a cache holds.

    Args:
        heads: Rules of all heads of all layers.
        tokens, batch: What it has read, padding included, of so many sequences.
        held: Bytes by storage.
        dense: Bytes that a cache of all tokens of all heads would hold.
    """
    full, resident = sum(spec.is_global for spec in heads), sum(held.values())
    less = f", {dense / resident:.1f}x less" if resident else ""
    parts = ", ".join(f"{_size(nbytes)} {name}" for name, nbytes in held.items())
    return (
        f"RedKnotCache({tokens:,} tokens x {batch} sequences, {full} global + {len(heads) - full} local heads, "
        f"{_size(resident)} resident{f' ({parts})' if len(held) > 1 else ''}, dense {_size(dense)}{less})"
    )


def _size(nbytes: int) -> str:
    amount, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while amount >= 1024 and unit != "GiB":
        amount, unit = amount / 1024, next(units)
    return f"{amount:.1f} {unit}" if unit != "B" else f"{nbytes} B"
