"""What a frontier's items amount to: figures with paired intervals, a table, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from evals.intervals import estimate
from evals.real.items import TASKS

Line = dict[str, Any]
_SHOWN = ("drift", "fisher", "loss", "windows only", "storages only", "mass", "streaming", "random")


def summarize(*sources: Path, against: str = "fisher") -> list[Line]:
    """A line for every method and budget of the items files of one length, by rising budget; each item counts once.

    Of every task: `answers`, `right` (share, in points), `apart` (points to dense on the same answers: value, low,
    high), `kl` (nats a token: value, low, high), `top1` (share of tokens as dense, in points). Where a method that is
    named has a plan for the same budget, `beyond` says what a line has more than that, item by item: `apart` in points
    and `kl` in nats.

    Raises:
        ValueError: The files are of several lengths, or of texts of several versions of Python; or one does not say.
    """
    heads, found_rows = [], {}
    for source in sources:
        head, *rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        if missing := [name for name in ("length", "texts", "hardware") if name not in head]:
            raise ValueError(
                f"{source}: its first line does not say {', '.join(missing)}, as that of an older `frontier`: "
                "run it anew"
            )
        heads.append(head)
        found_rows |= {(row["item"], row["method"], row["budget"]): row for row in rows}
    head, rows = heads[0], list(found_rows.values())
    for what in ("length", "texts"):
        if any(other[what] != head[what] for other in heads):
            found = sorted({other[what] for other in heads})
            raise ValueError(f"the items are of several {what}, {found}: summarize each apart")
    dense = {row["item"]: row["tasks"] for row in rows if row["method"] == "dense"}
    named = {(row["budget"], row["item"]): row["tasks"] for row in rows if row["method"] == against}

    def name(row: Line) -> tuple[float, str]:
        return row["budget"], row["method"]

    found = []
    for (budget, method), of_it in groupby(sorted(rows, key=name), key=name):
        same = list(of_it)
        tasks = {task: _figures(task, same, dense) for task in TASKS if task in same[0]["tasks"]}
        found.append(
            {"benchmark": "real_frontier", "length": head["length"], "method": method, "budget": budget,
             "kept": same[0]["kept"], "items": len(same), "tasks": tasks, "hardware": head["hardware"]}
        )  # fmt: skip
        other = {row["item"]: named[budget, row["item"]] for row in same if (budget, row["item"]) in named}
        if method != against and len(other) == len(same):
            found[-1]["beyond"] = {"method": against, **{task: _beyond(task, same, other) for task in tasks}}
    return found


def _figures(task: str, rows: Sequence[Line], dense: dict[int, Any]) -> Line:
    clusters = [row["item"] for row in rows]
    answers, right, tokens, _, kl, same = zip(*(row["tasks"][task] for row in rows), strict=True)
    theirs = [dense[item][task][1] for item in clusters]
    apart = estimate(clusters, (right, theirs, answers), lambda mine, other, n: 100 * (mine - other) / n)
    return {
        "answers": sum(answers), "right": round(100 * sum(right) / sum(answers), 2), "apart": apart.to_json(),
        "kl": estimate(clusters, (kl, tokens), lambda total, n: total / n).to_json(),
        "top1": round(100 * sum(same) / sum(tokens), 2),
    }  # fmt: skip


def _beyond(task: str, rows: Sequence[Line], others: dict[int, Any]) -> Line:
    clusters = [row["item"] for row in rows]
    mine, theirs = [row["tasks"][task] for row in rows], [others[item][task] for item in clusters]
    answers, right, tokens, _, kl, _ = zip(*mine, strict=True)
    _, their_right, _, _, their_kl, _ = zip(*theirs, strict=True)
    apart = estimate(clusters, (right, their_right, answers), lambda mine, other, n: 100 * (mine - other) / n)
    divergence = estimate(clusters, (kl, their_kl, tokens), lambda mine, other, n: (mine - other) / n)
    return {"apart": apart.to_json(), "kl": divergence.to_json()}


def write(lines: Iterable[Line], path: Path) -> None:
    """Writes the lines as JSON, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def table(lines: Sequence[Line]) -> str:
    """A Markdown table: right answers in per cent and, in brackets, KL to dense."""
    head = ["bytes kept", "method", *TASKS]
    rows = [head, ["---"] * len(head)]
    rows += [
        [f"{line['kept']:.2f}", line["method"], *(_cell(line["tasks"].get(task)) for task in TASKS)] for line in lines
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(found: Line | None) -> str:
    return f"{found['right']:.1f} ({found['kl'][0]:.3f})" if found else "-"


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draws right answers, and KL, of every task over the bytes kept.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure((4 * len(TASKS), 7), layout="constrained")
    colours = dict(zip(_series(lines), map(tuple, colormaps["tab20"](range(20))), strict=False))
    panels = figure.subplots(2, len(TASKS), sharex=True)
    for column, task in enumerate(TASKS):
        for what, rows in _series([line for line in lines if task in line["tasks"]]).items():
            kept = [line["kept"] for line in rows]
            style = {
                "marker": "o",
                "markersize": 3,
                "label": what,
                "color": colours[what],
                "linewidth": 2 if what in ("drift", "fisher", "loss") else 1,
            }
            panels[0][column].plot(kept, [line["tasks"][task]["right"] for line in rows], **style)
            panels[1][column].plot(kept, [max(line["tasks"][task]["kl"][0], 1e-4) for line in rows], **style)
        (dense,) = (line["tasks"][task]["right"] for line in lines if line["method"] == "dense")
        panels[0][column].axhline(dense, color="black", linewidth=0.8, linestyle="--")
        panels[0][column].set(title=task, ylabel="right, %" if not column else "")
        panels[1][column].set(yscale="log", xlabel="bytes kept", ylabel="KL, nats a token" if not column else "")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _series(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines by what is drawn as one."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        what = next((name for name in _SHOWN if line["method"].startswith(name)), None)
        if line["method"] == "drift at 2K" or what is None:
            what = line["method"]
        if what != "dense":
            found.setdefault(what, []).append(line)
    return found
