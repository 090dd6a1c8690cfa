"""What `evals.benchmarks.reuse` found, as records with intervals, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from evals.intervals import mean
from evals.tiny.facts import DEPENDENT_KINDS, KINDS

PARTS = {"single facts": KINDS, "dependent facts": DEPENDENT_KINDS}
WHOLE = "read whole"


@dataclass
class Scores:
    """What a method did, question by question.

    Attributes:
        context: Which context the question is of.
        kind: Kind of the question.
        right: The answer was.
        kl: Of the reference's next tokens against the method's, in nats, mean over the answer.
        cold, hot: Seconds to build each context's cache.
        recomputed: Share of each context's tokens that went through the model.
    """

    context: list[int] = field(default_factory=list)
    kind: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)
    recomputed: list[float] = field(default_factory=list)


def summary(results: dict[str, Scores], part: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a method: figures with their intervals, and what they were taken on."""
    whole = results[WHOLE]
    records = []
    for name, scores in results.items():
        right, reference = np.array(scores.right, float), np.array(whole.right, float)
        by_kind = {
            kind: f"{int(right[(which := np.array(scores.kind) == kind)].sum())}/{which.sum()}"
            for kind in dict.fromkeys(scores.kind)
        }
        records.append(
            {
                "part": part,
                "method": name,
                "questions": len(right),
                "accuracy": mean(scores.context, right.tolist()).to_json(),
                "accuracy_minus_whole": mean(scores.context, (right - reference).tolist()).to_json(),
                "kl": mean(scores.context, scores.kl).to_json(),
                "recomputed": float(np.mean(scores.recomputed)),
                "cold_s": float(np.median(scores.cold)),
                "hot_s": float(np.median(scores.hot)),
                "by_kind": by_kind,
                **about,
            }
        )
    return records


def table(records: Sequence[dict[str, Any]], part: str) -> Table:
    """The records of one part, for people."""
    made = Table("method", title=part)
    for name in ("right", "minus whole, points", "KL", "recomputed", "cold", "hot"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            record["method"],
            f"{100 * record['accuracy'][0]:.1f} %",
            _with_ends([None if x is None else 100 * x for x in record["accuracy_minus_whole"]], "+.1f"),
            _with_ends(record["kl"], ".2g"),
            f"{record['recomputed']:.0%}",
            f"{record['cold_s']:.2f} s",
            f"{record['hot_s']:.2f} s",
        )
    return made


def _with_ends(estimate: Sequence[float | None], form: str) -> str:
    """A figure with its interval, if there are contexts enough for one."""
    value, low, high = (None if x is None else format(x, form) for x in estimate)
    return f"{value} ({low} to {high})" if low else f"{value}"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """KL and accuracy over the share of tokens that are recomputed."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, colour in zip(PARTS, ("tab:blue", "tab:red"), strict=False):
        mine = [r for r in records if r["part"] == part and r["method"] not in ("dense", WHOLE)]
        lines = [r for r in mine if r["method"].startswith(("naive", "boundary")) and "no prefix" not in r["method"]]
        for axes, name, scale in ((left, "kl", 1), (right, "accuracy_minus_whole", 100)):
            x, y = (
                [100 * r["recomputed"] for r in lines],
                [[scale * (r[name][0] if v is None else v) for v in r[name]] for r in lines],
            )
            middle, low, high = zip(*y, strict=True)
            axes.plot(x, middle, "o-", color=colour, label=f"boundary, {part}")
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            for method, marker in (("deviation 15 %", "s"), ("attention 15 %", "^"), ("naive, no prefix", "x")):
                for r in (r for r in mine if r["method"] == method):
                    label = f"{method}, {part}"
                    axes.plot(100 * r["recomputed"], scale * r[name][0], marker, color=colour, label=label)
    left.set(xlabel="recomputed tokens, %", ylabel="KL(read whole, reused), nats")
    left.set_yscale("symlog", linthresh=1e-5)
    right.set(xlabel="recomputed tokens, %", ylabel="answers right, points above reading whole")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
