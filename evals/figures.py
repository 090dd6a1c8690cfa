"""Figures of a report, each in a light and a dark theme, for a desk and for a phone."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from evals.summary import Row

MIB = 2**20
_MARKERS = "oDsv^PXd*h<>"
# Colours and marks of the methods that come most, by their place; others have one by their name.
_PLACES = {
    "dense": 0,
    "redknot": 1,
    "streaming": 2,
    "redknot, wrong heads": 3,
    "static": 4,
    "redknot, all global": 5,
    "kvpress, adakv-expected-attention": 6,
    "kvpress, adakv-snapkv": 7,
}


@dataclass(frozen=True)
class Style:
    """How a figure looks.

    Attributes:
        ink, faint, paper: Colours of text, of lines behind, of the ground.
        series: Colours of methods in the order they come.
        heads: Colours of heads, from the least kept to all.
        narrow: For a phone: panels stand below each other.
    """

    ink: str
    faint: str
    paper: str
    series: tuple[str, ...]
    heads: tuple[str, ...]
    narrow: bool = False

    @property
    def width(self) -> float:
        """Inches."""
        return 4.1 if self.narrow else 9.0


_LIGHT = Style(
    "#1b1f24", "#d0d7de", "#ffffff",
    ("#57606a", "#0a7ea4", "#c8102e", "#d9730d", "#2f6fdb", "#1a7f37", "#8250df", "#8a6d3b", "#bf3989"),
    ("#e8ecf0", "#c9d7ea", "#9dbbe0", "#6d9bd2", "#c8102e"),
)  # fmt: skip
_DARK = Style(
    "#e6edf3", "#3d444d", "#0d1117",
    ("#9aa4af", "#4cc2e8", "#ff5a6e", "#ffa657", "#79b0ff", "#56d364", "#c8a6ff", "#d9bd85", "#ff8cc8"),
    ("#1c2430", "#223a58", "#2c5687", "#3c7abf", "#ff5a6e"),
)  # fmt: skip
STYLES = {
    ("light", "wide"): _LIGHT,
    ("dark", "wide"): _DARK,
    ("light", "narrow"): Style(**{**vars(_LIGHT), "narrow": True}),
    ("dark", "narrow"): Style(**{**vars(_DARK), "narrow": True}),
}
Draw = Callable[[Style], Figure]


def render(draw: Draw, style: Style, format: str) -> bytes:
    """Return a figure as the bytes of an image: "svg" or "png"."""
    settings: Any = {
        "font.size": 10, "text.color": style.ink, "axes.labelcolor": style.ink, "axes.edgecolor": style.faint,
        "axes.titlecolor": style.ink, "xtick.color": style.ink, "ytick.color": style.ink, "grid.color": style.faint,
        "figure.facecolor": style.paper, "axes.facecolor": style.paper, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
        "svg.fonttype": "path", "svg.hashsalt": "redknot",
    }  # fmt: skip
    target = io.BytesIO()
    with mpl.rc_context(settings):
        metadata = {"Date": None} if format == "svg" else {}
        draw(style).savefig(target, format=format, dpi=150, metadata=metadata)
    return target.getvalue()


def differences(rows: Sequence[Row], style: Style) -> Figure:
    """Draw each method's difference to dense in points of score, with its interval; a panel for each length."""
    shown = [row for row in rows if row.score_difference is not None and row.name != "dense"]
    panels = _panels(shown)
    tallest = max(len(panel) for _, panel in panels)
    figure = _figure(len(panels), style, 0.34 * tallest + 0.9, reserve=0.0)
    for axes, (title, panel) in zip(_axes(figure, len(panels), style, share_y=_alike(panels)), panels, strict=True):
        colours = _colours(panel, style)
        for y, row in enumerate(panel):
            apart = row.score_difference
            assert apart is not None
            colour, marker = colours[row.name]
            if apart.low is not None and apart.high is not None:
                axes.plot([apart.low, apart.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot([apart.value], [y], marker=marker, color=colour, markersize=6)
            axes.annotate(f"{apart.value:+.1f}", (apart.value, y), (0, 5), textcoords="offset points", fontsize=8,
                          color=style.ink, ha="center")  # fmt: skip
        axes.margins(x=0.14)  # room for the number at a mark
        axes.axvline(0, color=style.ink, linewidth=0.8)
        axes.axvspan(-1, 1, color=style.faint, alpha=0.5, linewidth=0)
        axes.set(title=title, xlabel="points of score, to dense", ylim=(len(panel) - 0.5, -0.5))
        axes.set_yticks(range(len(panel)), [_name(row, style) for row in panel])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def frontier(rows: Sequence[Row], style: Style) -> Figure:
    """Draw agreement with dense over resident bytes, a panel for each length.

    A press hides what it drops and does not free it: a hollow mark shows the bytes that its share would take.
    """
    panels = _panels(rows)
    names = list(dict.fromkeys(row.name for _, panel in panels for row in panel))
    columns = 1 if style.narrow else 3
    figure = _figure(len(panels), style, 2.6, reserve=0.22 * math.ceil((len(names) + 1) / columns) + 0.15)
    colours = _colours([row for _, panel in panels for row in panel], style)
    for axes, (title, panel) in zip(_axes(figure, len(panels), style, share_y=True), panels, strict=True):
        for row in panel:
            colour, marker = colours[row.name]
            y, x = row.top1, row.resident_bytes / MIB
            if y.low is not None and y.high is not None:
                axes.plot([x, x], [y.low, y.high], color=colour, linewidth=1.4)
            if "kept" in row.run.method and row.dense_share:
                hollow = x / row.dense_share * row.run.method["kept"]
                axes.plot([hollow, x], [y.value, y.value], color=colour, linewidth=0.8, linestyle=":")
                axes.plot([hollow], [y.value], marker=marker, color=colour, markerfacecolor=style.paper, markersize=7)
            axes.plot([x], [y.value], marker=marker, color=colour, markersize=7)
        axes.margins(x=0.08)  # before the limits, which take it in
        axes.set(title=title, xlabel="resident keys and values (MiB)", ylim=(-4, 104), xlim=(0, None))
        axes.grid(axis="y", linewidth=0.6)
    figure.axes[0].set_ylabel("tokens as dense (%)")
    marks = [Line2D([], [], color=colours[n][0], marker=colours[n][1], linestyle="", label=n) for n in names]
    if any("kept" in row.run.method for row in rows):
        marks.append(
            Line2D([], [], color=style.ink, marker="o", linestyle=":", markerfacecolor=style.paper,
                   label="hollow: if what it hides were freed")
        )  # fmt: skip
    figure.legend(handles=marks, loc="outside lower left", ncols=columns, fontsize=9)
    return figure


def times(rows: Sequence[Row], style: Style) -> Figure:
    """Draw the time to the first token and of each later one, a row of bars for each method."""
    panels = _panels(rows)
    figures = (("time to first token (s)", lambda row: row.ttft_s), ("time per later token (ms)", _token_ms))
    tallest = max(len(panel) for _, panel in panels)
    across = 1 if style.narrow else len(figures)
    down = len(panels) * len(figures) // across
    figure = Figure(figsize=(style.width, down * (0.3 * tallest + 0.95)), layout=_layout())
    grid = figure.subplots(down, across, squeeze=False, sharey=not style.narrow and _alike(panels))
    for axes, (title, panel, label, value) in zip(
        grid.flat, ((t, p, label, value) for t, p in panels for label, value in figures), strict=True
    ):
        colours = _colours(panel, style)
        axes.barh(
            range(len(panel)), [value(row) or 0 for row in panel], 0.62, color=[colours[r.name][0] for r in panel]
        )
        axes.set_yticks(range(len(panel)), [_name(row, style) for row in panel])
        axes.set(title=title, xlabel=label, ylim=(len(panel) - 0.5, -0.5))
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def _figure(panels: int, style: Style, height: float, reserve: float) -> Figure:
    across = 1 if style.narrow else min(panels, 2)
    return Figure(figsize=(style.width, -(-panels // across) * height + reserve), layout=_layout())


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.06)


def _axes(figure: Figure, panels: int, style: Style, share_y: bool) -> list[Any]:
    across = 1 if style.narrow else min(panels, 2)
    grid = figure.subplots(-(-panels // across), across, squeeze=False, sharey=share_y and not style.narrow)
    for axes in grid.flat[panels:]:
        axes.set_visible(False)
    return list(grid.flat[:panels])


def _panels(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of one task and length stand together."""
    whole = [row for row in rows if not row.kind]
    return [(f"{task}, {length} tokens", list(same))
            for (task, length), same in groupby(whole, key=lambda row: (row.run.task, row.run.length))]  # fmt: skip


def _alike(panels: list[tuple[str, list[Row]]]) -> bool:
    """Whether all panels show the same methods, and can share their names."""
    return len({tuple(row.name for row in panel) for _, panel in panels}) == 1


def _colours(rows: Sequence[Row], style: Style) -> dict[str, tuple[str, str]]:
    """A colour and a mark for each method: its own, whatever else a report shows, and whichever comes first."""
    found: dict[str, int] = {}
    for name in sorted({row.name for row in rows} | {"dense"}, key=lambda name: (name not in _PLACES, name)):
        place = _PLACES.get(name, zlib.crc32(name.encode()) % len(_MARKERS))
        while place in found.values() and len(found) < len(_MARKERS):
            place = (place + 1) % len(_MARKERS)
        found[name] = place
    return {name: (style.series[i % len(style.series)], _MARKERS[i]) for name, i in found.items()}


def _name(row: Row, style: Style) -> str:
    """On a phone a long name takes two lines."""
    return row.name.replace(", ", ",\n", 1) if style.narrow and len(row.name) > 14 else row.name


def _token_ms(row: Row) -> float | None:
    return None if row.token_s is None else 1e3 * row.token_s
