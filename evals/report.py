"""A report of records: Markdown, figures as PNG, and one HTML page that holds all it needs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from evals import figures, head_map
from evals.figures import STYLES, Draw, Style
from evals.headline import digest, headline, mood
from evals.identity import plan_identity
from evals.intervals import Estimate
from evals.summary import Row
from redknot_hf import HeadPlan
from redknot_hf.profiling import HeadProfile
from redknot_hf.profiling.figure import heat_map

TEMPLATE = Path(__file__).resolve().parent / "page.html.jinja"
Column = tuple[str, Callable[[Row], str]]
Table = dict[str, Any]  # its head, a list of cells, and its body, a list of those


def write_report(
    rows: Sequence[Row],
    out: Path,
    plans: Sequence[tuple[str, HeadPlan]] = (),
    title: str = "RedKnot evaluation",
    profiles: Sequence[tuple[str, HeadProfile]] = (),
) -> Path:
    """Write `report.html`, `report.md`, `summary.jsonl` and PNGs of the figures into a folder.

    Args:
        rows: See `summarize`.
        out: Files of the same names in it are replaced.
        plans: Plans to draw, with their names.
        title: Of the report.
        profiles: Profiles to draw, with their names.

    Returns:
        The path of the page.

    Raises:
        ValueError: There is nothing to report.
    """
    if not rows:
        raise ValueError("the records hold no answers yet")
    out.mkdir(parents=True, exist_ok=True)
    drawings = _drawings(rows, plans) | _heat_maps(profiles)
    for name, (_, draw) in drawings.items():
        (out / f"{name}.png").write_bytes(figures.render(draw, STYLES["light", "wide"], "png"))
    (out / "summary.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    (out / "report.md").write_text(markdown(rows, {name: caption for name, (caption, _) in drawings.items()}, title))
    page = out / "report.html"
    page.write_text(_page(rows, drawings, title))
    return page


def markdown(rows: Sequence[Row], captions: dict[str, str], title: str) -> str:
    """Return the report in Markdown; figures lie beside it as `NAME.png`."""
    lines = [f"# {title}", "", f"**{headline(rows)}**", "", *_markdown(digest(rows))]
    for heading, table in _tables(rows):
        lines += [f"## {heading}", ""]
        for columns in (_FIDELITY, _COST):
            lines += _markdown(_cells(columns, table))
    for heading, table in _by_kind(rows):
        lines += [f"## {heading}", "", *_markdown(table)]
    for name, caption in captions.items():
        lines += [f"![{caption}]({name}.png)", "", caption, ""]
    lines += ["## What it was measured on", "", *(f"* {line}" for line in provenance(rows)), ""]
    return "\n".join([*lines, "## How to read it", "", *(f"* {line}" for line in _READING), ""])


def provenance(rows: Sequence[Row]) -> list[str]:
    """Return what produced the rows, in words, each thing once."""
    found = []
    for row in rows:
        model, run = row.run.model, row.run
        found.append(f"Model {model['name']} ({model['type']}, {model['dtype']}, weights {model['weights']})")
        if "plan" in run.method:
            count = f"{run.method['global']} of {run.method['heads']} KV heads global"
            found.append(f"Plan of {row.name}: {count}, hash {run.method['plan']}")
        found.append("Versions: " + ", ".join(f"{name} {version}" for name, version in run.versions.items()))
        found.append("Hardware: " + ", ".join(f"{name} {value}" for name, value in run.hardware.items()))
    return sorted(dict.fromkeys(found))


def _drawings(rows: Sequence[Row], plans: Sequence[tuple[str, HeadPlan]]) -> dict[str, tuple[str, Draw]]:
    """Figures by the name of their file: a caption, and what draws it."""
    whole = [row for row in rows if not row.kind]
    found: dict[str, tuple[str, Draw]] = {}
    if any(row.score_difference is not None and row.name != "dense" for row in whole):
        text = "Score to dense on the same examples, with 95 % intervals; the band is one point either way."
        found["differences"] = (text, lambda style: figures.differences(whole, style))
    text = "Tokens of the dense answer that a method would have chosen too, over the bytes it holds after reading."
    found["frontier"] = (text, lambda style: figures.frontier(whole, style))
    found["times"] = ("Medians; one step at a time, without compilation.", lambda style: figures.times(whole, style))
    for i, (name, plan) in enumerate(plans):
        text = f"What each KV head keeps under {name} (plan {plan_identity(plan)['plan']})."

        def draw(style: Style, plan: HeadPlan = plan, name: str = name) -> Any:
            return head_map.heads(plan, name, style)

        found[f"heads_{i}" if len(plans) > 1 else "heads"] = (text, draw)
    return found


def _heat_maps(profiles: Sequence[tuple[str, HeadProfile]]) -> dict[str, tuple[str, Draw]]:
    found: dict[str, tuple[str, Draw]] = {}
    for i, (name, profile) in enumerate(profiles):
        text = f"What restricting each KV head costs, by {profile.method} ({name}); framed heads stay global."

        def draw(style: Style, profile: HeadProfile = profile) -> Any:
            return heat_map(profile, profile.plan(), style.width)

        found[f"profile_{i}" if len(profiles) > 1 else "profile"] = (text, draw)
    return found


def _page(rows: Sequence[Row], drawings: dict[str, tuple[str, Draw]], title: str) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    pictures = [
        {"name": name, "caption": caption, **{"_".join(which): _image(draw, style) for which, style in STYLES.items()}}
        for name, (caption, draw) in drawings.items()
    ]  # fmt: skip
    sections = [
        {
            "heading": heading,
            "rows": [
                {"name": row.name, "verdict": row.verdict, "mood": mood(row), "points": _points(row)} for row in table
            ],
            "tables": [_cells(columns, table) for columns in (_WITHOUT_VERDICT, _COST)],
        }
        for heading, table in _tables(rows)
    ]
    return environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        headline=headline(rows),
        digest=digest(rows),
        sections=sections,
        kinds=[{"heading": heading, "table": table} for heading, table in _by_kind(rows)],
        pictures=pictures,
        provenance=provenance(rows),
        reading=_READING,
    )


def _image(draw: Draw, style: Style) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(figures.render(draw, style, "svg")).decode()


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    whole = [row for row in rows if not row.kind]
    tables = []
    for (task, length), same in groupby(whole, key=lambda row: (row.run.task, row.run.length)):
        table = list(same)
        most = max(row.answers for row in table)
        contexts = max(row.contexts for row in table)
        tables.append((f"{task}, {length} tokens: {most} answers about {contexts} contexts", table))
    return tables


def _cells(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    return {"head": [head for head, _ in columns], "body": [[cell(row) for _, cell in columns] for row in rows]}


def _by_kind(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Scores of each kind of question, methods to the right, a table for each task and length."""
    tables = []
    parts = (row for row in rows if row.kind)
    for (task, length), same in groupby(parts, key=lambda row: (row.run.task, row.run.length)):
        table = list(same)
        methods = list(dict.fromkeys(row.name for row in table))
        body = []
        for kind, held in groupby(table, key=lambda row: row.kind):
            by_name = {row.name: row for row in held}
            answers = max(row.answers for row in by_name.values())
            scores = (f"{by_name[name].score.value:.1f}" if name in by_name else "-" for name in methods)
            body.append([kind, str(answers), *scores])
        tables.append(
            (
                f"Score by kind of question: {task}, {length} tokens",
                {"head": ["kind", "answers", *methods], "body": body},
            )
        )
    return tables


def _markdown(table: Table) -> list[str]:
    if not table["body"]:
        return []
    head = [f"| {' | '.join(table['head'])} |", f"|{'---|' * len(table['head'])}"]
    return [*head, *(f"| {' | '.join(row)} |" for row in table["body"]), ""]


def _points(row: Row) -> str:
    """How far from dense, as a large number."""
    apart = row.score_difference
    return "" if apart is None or row.name == "dense" else f"{apart.value:+.1f}"


def _with_interval(estimate: Estimate | None, form: str = ".1f") -> str:
    if estimate is None:
        return "-"
    value = f"{estimate.value:{form}}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


_FIDELITY: tuple[Column, ...] = (
    ("method", lambda row: row.name),
    ("answers", lambda row: str(row.answers)),
    ("score", lambda row: _with_interval(row.score)),
    ("to dense", lambda row: _with_interval(row.score_difference, "+.1f") if row.name != "dense" else "-"),
    ("verdict", lambda row: row.verdict),
    ("same answer %", lambda row: _with_interval(row.same_answer)),
    ("top-1 %", lambda row: _with_interval(row.top1)),
    ("top-10 %", lambda row: _with_interval(row.top10)),
    ("KL mean", lambda row: _with_interval(row.kl, ".2g")),
    ("KL p99", lambda row: f"{row.kl_p99:.2g}"),
    ("perplexity +", lambda row: _with_interval(row.perplexity_difference, "+.2g")),
    ("diverges at", lambda row: _number(row.diverges_at, ".0f")),
)
_COST: tuple[Column, ...] = (
    ("method", lambda row: row.name),
    ("first token s", lambda row: f"{row.ttft_s:.3f}"),
    ("later token ms", lambda row: "-" if row.token_s is None else f"{1e3 * row.token_s:.2f}"),
    ("tokens/s", lambda row: _number(row.tokens_per_s, ".1f")),
    ("resident MiB", lambda row: _mib(row.resident_bytes)),
    ("of dense", lambda row: _number(row.dense_share, ".0%")),
    ("peak MiB", lambda row: _mib(row.peak_bytes)),
)
_WITHOUT_VERDICT = tuple(column for column in _FIDELITY if column[0] != "verdict")
_READING = (
    "Scores and shares are in points of 100. Brackets are 95 % intervals: a paired bootstrap (BCa) over contexts, "
    "since questions about one context are no independent witnesses. Where no pair differs, the interval is what so "
    "many equal pairs leave possible.",
    "Same answer, top-1, top-10, KL and perplexity hold a method against the dense cache on the same tokens, given "
    "the dense answer. KL(dense || method) is in nats a token; perplexity + is what the method adds; diverges at is "
    "the median place of the first other token, counted from 0, where there is one.",
    "Every answer is decoded from the cache whose bytes and times are shown, first token included. It is then "
    "checked in one step from another fork of that cache; a method whose answers fail this is marked void.",
    "Peak is the most memory taken while the context was read: of the allocator on a GPU, of the process on a CPU, "
    "which is coarse; a dash where it saw less than is held.",
    "kvpress hides what a press drops and does not free it, so its resident bytes are those of dense; the share that "
    "it keeps is the plan's. It runs with its own, older transformers.",
)
