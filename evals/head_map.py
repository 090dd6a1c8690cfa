"""Pictures of what each KV head keeps: layers to the right, heads down, in every figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from evals.figures import Style
from redknot_hf import HeadPlan, HeadSpec

MIB = 2**20
# Global heads by what their pages are stored in, from few bits to all: how much of the full colour they have.
_STORED = {"int4": 0.5, "int8": 0.75, "model": 1.0}


def heads(plan: HeadPlan, title: str, style: Style) -> Figure:
    """Draw what each KV head keeps: windows from pale to strong, global in red, the paler the fewer bits."""
    most, cell = _size(plan, style)
    figure = Figure(figsize=(style.width, most * cell + 1.5), layout="constrained")
    _draw(figure, figure.subplots(), plan, title, style)
    return figure


def portrait(plan: HeadPlan, title: str, head_dim: tuple[int, int], style: Style) -> Figure:
    """Draw a plan's heads, and below them the bytes that one sequence keeps, by its length, up to 8K tokens.

    Args:
        plan: What to draw.
        title: Of the map.
        head_dim: Elements of a key and of a value.
        style: How it looks.
    """
    most, cell = _size(plan, style)
    figure = Figure(figsize=(style.width, most * cell + 4.0), layout="constrained")
    top, below = figure.subplots(2, 1, height_ratios=(most * cell + 0.5, 2.2))
    _draw(figure, top, plan, title, style)
    dense = HeadPlan([[HeadSpec()] * len(layer) for layer in plan])
    lengths = range(0, 8193, 64)
    for shown, name, colour in ((dense, "dense", style.ink), (plan, "this plan", style.heads[-1])):
        kept = [shown.nbytes(length, head_dim, "bfloat16") / MIB for length in lengths]
        below.plot(lengths, kept, color=colour, linewidth=2.2)
        below.annotate(f" {name}, {kept[-1]:.0f} MiB", (lengths[-1], kept[-1]), color=colour, va="center")
    below.set(xlabel="tokens of a sequence", ylim=(0, None), xlim=(0, lengths[-1] * 1.22))
    below.set_title("keys and values held, MiB")
    below.set_xticks(range(0, 8193, 2048))
    below.grid(axis="y", linewidth=0.6)
    return figure


def _size(plan: HeadPlan, style: Style) -> tuple[int, float]:
    """Most heads of a layer, and inches of a cell."""
    return max(len(layer) for layer in plan), min(0.42, (style.width - 1.0) / len(plan))


def _draw(figure: Figure, axes: Any, plan: HeadPlan, title: str, style: Style) -> None:
    most, cell = _size(plan, style)
    kinds = _kinds(plan)
    colours = _colours(kinds, style)
    place = {kind: i for i, kind in enumerate(kinds)}
    cells = [
        [place[_kind(plan[i][h])] if h < len(plan[i]) else math.nan for i in range(len(plan))] for h in range(most)
    ]
    axes.pcolormesh(
        cells, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(kinds) - 0.5, edgecolors=style.paper,
        linewidth=1.5 if cell > 0.15 else 0.4,
    )  # fmt: skip
    axes.set(title=title, xlabel="layer", ylabel="KV head", ylim=(most, 0), aspect="equal")
    axes.set_anchor("W")
    for axis, n in ((axes.xaxis, len(plan)), (axes.yaxis, most)):
        step = max(1, -(-n // 12))
        axis.set_ticks([i + 0.5 for i in range(0, n, step)])
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x - 0.5:.0f}"))
        axis.set_tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    marks = [
        Line2D([], [], marker="s", linestyle="", color=colour, label=_label(kind))
        for kind, colour in zip(kinds, colours, strict=True)
    ]
    figure.legend(handles=_ends(marks), loc="outside lower left", ncols=2 if style.narrow else 8, fontsize=9)


def _kind(spec: HeadSpec) -> tuple[int | None, str]:
    return spec.window, spec.storage if spec.is_global else "model"


def _kinds(plan: HeadPlan) -> list[tuple[int | None, str]]:
    """What there is, from the least kept to all."""
    found = {_kind(spec) for layer in plan for spec in layer}
    windows = sorted(kind for kind in found if kind[0] is not None)
    return [*windows, *((None, storage) for storage in _STORED if (None, storage) in found)]


def _colours(kinds: Sequence[tuple[int | None, str]], style: Style) -> list[Any]:
    pale, full = style.heads[:-1], style.heads[-1]
    windows = sum(kind[0] is not None for kind in kinds)
    found: list[Any] = [pale[round(i * (len(pale) - 1) / max(1, windows - 1))] for i in range(windows)]
    if windows == 1:
        found = [pale[1]]
    return found + [_mixed(full, style.paper, _STORED[storage]) for window, storage in kinds if window is None]


def _mixed(colour: str, paper: str, share: float) -> str:
    """A colour on paper, so much of it."""
    parts = (
        round(int(a, 16) * share + int(b, 16) * (1 - share))
        for a, b in ((colour[i : i + 2], paper[i : i + 2]) for i in (1, 3, 5))
    )
    return "#" + "".join(f"{part:02x}" for part in parts)


def _label(kind: tuple[int | None, str]) -> str:
    window, storage = kind
    if window is not None:
        return f"window {window}"
    return "global" if storage == "model" else f"global, {storage}"


def _ends(marks: list[Line2D]) -> list[Line2D]:
    """Of many kinds the smallest, some between and the largest are named."""
    if len(marks) <= 8:
        return marks
    return [marks[round(i * (len(marks) - 2) / 6)] for i in range(7)] + [marks[-1]]
