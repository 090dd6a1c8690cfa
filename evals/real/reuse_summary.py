"""What the rows of `bench reuse_real` amount to: figures with paired intervals, tables, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from evals.intervals import difference, estimate

Row = dict[str, Any]
DENSE = "dense"
_ABOUT = ("documents", "tokens", "stand_in", "dtype", "model", "date", "hardware")
_DRAWN = ("number", "word", "text")  # as far as they were asked


def read(files: Iterable[Path]) -> list[Row]:
    """All rows of some files; a context that several have counts once."""
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return list({(*_setting(row), row["context"], row["method"], row["kind"]): row for row in rows}.values())


def records(rows: Sequence[Row]) -> list[Row]:
    """A record a setting, kind and method, of the contexts that all methods have been asked about.

    Of every record: `right` (share), `right_minus_dense`, `kl` (nats a token) and `top1` (share of tokens as dense),
    each as value, low and high, by bootstrap over contexts; and the mean share `recomputed`.
    """
    found = []
    for _, of_it in groupby(sorted(rows, key=_setting), key=_setting):
        some = list(of_it)
        methods = list(dict.fromkeys(row["method"] for row in some))
        asked = [{row["context"] for row in some if row["method"] == name} for name in methods]
        common = set.intersection(*asked)
        for kind in dict.fromkeys(row["kind"] for row in some):
            mine = {
                name: {r["context"]: r for r in some if (r["method"], r["kind"]) == (name, kind)} for name in methods
            }
            order = sorted(common & mine[DENSE].keys())
            for name in methods if order else ():
                same = [mine[name][context] for context in order]
                found.append({"kind": kind, "method": name, **_figures(same, [mine[DENSE][c] for c in order])})
                found[-1] |= {"contexts": len(order), **{key: _common(same, key) for key in _ABOUT}}
    return found


def _common(rows: Sequence[Row], key: str) -> Any:
    """What all rows say, or all that they say: runs on several machines, or days, add to each other."""
    said = [row[key] for row in rows]
    unlike = [value for i, value in enumerate(said) if value not in said[:i]]
    return unlike[0] if len(unlike) == 1 else unlike


def _setting(row: Row) -> tuple[int, int]:
    return row["documents"], row["tokens"]


def _figures(rows: Sequence[Row], dense: Sequence[Row]) -> Row:
    contexts, n = [row["context"] for row in rows], [row["questions"] for row in rows]

    def share(column: str) -> list[float | None]:
        return estimate(contexts, ([row[column] for row in rows], n), lambda total, of: total / of).to_json()

    return {
        "questions": sum(n), "right": share("right"), "right_minus_dense": _apart(contexts, rows, dense),
        "kl": share("kl"), "top1": share("top1"), "recomputed": sum(row["recomputed"] for row in rows) / len(rows),
    }  # fmt: skip


def _apart(contexts: Sequence[int], rows: Sequence[Row], dense: Sequence[Row]) -> list[float | None]:
    """The paired difference of shares of right answers."""
    mine, theirs, n = (
        [row[c] for row in some] for some, c in ((rows, "right"), (dense, "right"), (rows, "questions"))
    )
    if mine == theirs:  # `difference` says what so many equal answers leave possible
        every = [context for context, count in zip(contexts, n, strict=True) for _ in range(count)]
        return difference(every, [0.0] * len(every), [0.0] * len(every)).to_json()
    return estimate(contexts, (mine, theirs, n), lambda a, b, of: (a - b) / of).to_json()


def table(found: Sequence[Row]) -> Iterator[Table]:
    """The records for people: a table a setting and kind."""
    for (documents, tokens, kind), same in groupby(found, key=lambda r: (*_setting(r), r["kind"])):
        some = list(same)
        made = Table("method", title=f"{documents} x {tokens}, {kind}: {some[0]['questions']} questions")
        for name in ("recomputed", "right", "minus dense, points", "KL", "as dense"):
            made.add_column(name, justify="right")
        for record in some:
            value, low, high = record["right_minus_dense"]
            ends = "" if low is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"
            made.add_row(
                record["method"], f"{record['recomputed']:.0%}", f"{100 * record['right'][0]:.1f} %",
                f"{100 * value:+.1f}{ends}", f"{record['kl'][0]:.4f}", f"{100 * record['top1'][0]:.1f} %",
            )  # fmt: skip
        yield made


def write(found: Iterable[Row], path: Path) -> None:
    """Writes the records as JSON, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")


def draw(found: Sequence[Row], path: Path) -> None:
    """Draws points to dense, with intervals, and KL of every method, a row a setting and a column a kind.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    settings = sorted({_setting(record) for record in found})
    names = [name for name in dict.fromkeys(record["method"] for record in found) if name != DENSE]
    kinds = [kind for kind in _DRAWN if any(record["kind"] == kind for record in found)]
    figure = Figure((3 + 3.5 * len(kinds), 0.26 * len(names) * len(settings) + 1), layout="constrained")
    panels = figure.subplots(len(settings), len(kinds), squeeze=False)
    for line, setting in zip(panels, settings, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            mine = {r["method"]: r for r in found if (_setting(r), r["kind"]) == (setting, kind)}
            where = [names.index(name) for name in mine if name != DENSE]
            kl = [record["kl"] for name, record in mine.items() if name != DENSE]
            bars = [max(value, 1e-4) for value, *_ in kl]
            axes.barh(where, bars, color=["tab:blue" if "stand-in" in names[i] else "tab:gray" for i in where])
            for i, bar, (_, low, high) in zip(where, bars, kl, strict=True):
                if low is not None:
                    axes.plot([max(low, 1e-4), high], [i, i], color="black", linewidth=1)
                if kind != "text":  # of which no answer is right or wrong as a whole
                    points = 100 * mine[names[i]]["right_minus_dense"][0]
                    axes.annotate(f" {points:+.0f}", (max(bar, high or 0), i), va="center", fontsize=7)
            axes.set(xscale="log", title=f"{setting[0]} documents of {setting[1]}: {kind}", xlabel="KL, nats a token")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_yticks(range(len(names)), names if axes is line[0] else [""] * len(names), fontsize=7)
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle("beside the bars: right answers, points to dense", fontsize=8)
    figure.savefig(path, dpi=90)
