"""What `evals.benchmarks.profiling` found, drawn: the frontier of each model, and the heat map of its profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.benchmarks.commands.profiling import METHODS
from evals.benchmarks.options import MODELS
from redknot_hf import HeadSpec
from redknot_hf.profiling import HeadProfile

RANDOM = ("random 0", "random 1", "random 2")
LOCAL = {"bundled": HeadSpec(window=128, sink=4), "plain": HeadSpec(window=512, sink=4)}


def draw(rows: Sequence[dict[str, Any]], folder: Path, profiles: Path) -> None:
    """Draws the frontier of each model, and the heat map of its profile by loss."""
    from matplotlib.figure import Figure

    from redknot_hf.profiling.figure import heat_map

    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        path = profiles / f"{name}_loss.json"
        if path.exists():
            profile = HeadProfile.load(path)
            heat_map(profile, profile.plan()).savefig(folder / f"profile_{name}.png", dpi=100)
    names = [name for name in MODELS if any(r["model"] == name and r["stage"] == "frontier" for r in rows)]
    if not names:
        return
    figure = Figure((5 * len(names), 4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
    for panel, name in zip(panels, names, strict=True):
        found = [row for row in rows if row["model"] == name and row["stage"] == "frontier"]
        for method in [m for m in METHODS if any(row["what"] == m for row in found)]:
            points = sorted((row["ratio"], row["accuracy"]) for row in found if row["what"] == method)
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method)
        ratios = sorted({row["ratio"] for row in found})
        chance = [np.mean([r["accuracy"] for r in found if r["what"] in RANDOM and r["ratio"] == x]) for x in ratios]
        panel.plot(ratios, chance, color="gray", linestyle=":", label="random (mean of 3)")
        panel.axhline(found[0]["dense_accuracy"], color="black", linewidth=0.8, label="dense")
        title = f"{name}, window {LOCAL[name].window}, {found[0]['tokens']} answer tokens" + worse(found)
        panel.set(title=title, xlabel="share of global KV heads")
    panels[0].set_ylabel("answer tokens right")
    panels[0].legend()
    figure.savefig(folder / "profiling_frontier.png", dpi=100)


def worse(found: Sequence[dict[str, Any]]) -> str:
    """Says where a method is worse than the mean of the random plans."""
    told = []
    for method in METHODS:
        below = [
            row["ratio"]
            for row in found
            if row["what"] == method
            and row["accuracy"]
            < np.mean([r["accuracy"] for r in found if r["what"] in RANDOM and r["ratio"] == row["ratio"]])
        ]
        if below:
            told.append(f"{method} is below random at {', '.join(f'{ratio:.0%}' for ratio in sorted(below))}")
    return "\n" + "\n".join(told) if told else ""
