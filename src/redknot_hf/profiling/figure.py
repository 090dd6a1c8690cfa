"""A profile as a picture: a heat map of errors, and the heads that a plan makes global."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from redknot_hf.plan.plan import HeadPlan

from .choices import name_of
from .head_profile import HeadProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plotting() -> None:
    """Raises ImportError, with the remedy, if a heat map cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise ImportError("a heat map needs matplotlib: pip install 'redknot-hf[plot]'")


def heat_map(profile: HeadProfile, plan: HeadPlan | None = None, width: float | None = None) -> Figure:
    """Draws the errors, a panel for each choice: layers to the right, KV heads down, on a scale of powers of ten.

    Args:
        profile: What to draw.
        plan: Its global heads get a frame.
        width: Of the figure, in inches; by default what the layers take.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, heads = len(profile.heads_by_layer), max(profile.heads_by_layer)
    across, height = 1.2 + 0.22 * layers, 0.9 + 0.22 * heads
    figure = Figure((width or across, 1.4 + height * len(profile.choices)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(profile.choices), 1, sharex=True))
    positive = profile.errors[profile.errors > 0]
    norm = LogNorm(np.quantile(positive, 0.02), positive.max()) if len(set(positive)) > 1 else None
    image = None
    for panel, choice in zip(panels, profile.choices, strict=True):
        columns = [np.pad(row, (0, heads - len(row)), constant_values=np.nan) for row in profile.table(choice)]
        image = panel.imshow(np.stack(columns, 1), norm=norm, cmap="magma_r", aspect="equal", interpolation="none")
        panel.set(title=name_of(choice), ylabel="KV head")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        for layer, specs in enumerate(plan or ()):
            for head, spec in enumerate(specs):
                if spec.is_global:
                    x, y = np.array([0, 1, 1, 0, 0]) + layer - 0.5, np.array([0, 0, 1, 1, 0]) + head - 0.5
                    panel.plot(x, y, color="tab:cyan", linewidth=1.2, clip_on=False)
    panels[-1].set_xlabel("layer")
    units = {
        "drift": "drift of the residual stream",
        "fisher": "KL foretold, nats a token",
        "loss": "KL foretold, nats a token",
        "mass": "attention mass",
        "gates": "gate",
    }
    if image is not None:
        figure.colorbar(
            image, ax=list(panels), label=units.get(profile.method, profile.method), location="bottom",
            shrink=min(1.0, across / figure.get_figwidth()), aspect=30, anchor=(0, 1), panchor="W",
        )  # fmt: skip
    return figure
