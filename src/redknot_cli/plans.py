"""`redknot plan`: look at head plans, convert and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .terminal import console, show, tell, told

plans = typer.Typer(no_args_is_help=True, help="Look at head plans, convert and compare them.")


@plans.command("show")
def show_plan(plan: Annotated[str, typer.Argument(help="A plan, or a file that convert takes.")]) -> None:
    """Print a plan: which heads are global, what it keeps, and where it comes from."""
    with told():
        loaded = _any_plan(plan)
    show(loaded)


@plans.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A profile, RedKnot's head classes, or DuoAttention's scores: file, URL or model.")
    ],
    out: options.Out,
    budget: options.Budget = None,
    global_ratio: options.Ratio = None,
    bytes_per_token: options.Bytes = None,
    max_error: Annotated[float | None, typer.Option(help="Largest error of a profile's heads.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens at which a budget is meant; the profile's.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Least score of a global head of DuoAttention.")] = None,
) -> None:
    """Write a plan from a profile (for a budget), from RedKnot's head classes or from DuoAttention's scores."""
    bounds = {"budget": budget, "global_ratio": global_ratio, "bytes_per_token": bytes_per_token}
    bounds |= {"max_error": max_error, "threshold": threshold, "length": length}
    with told():
        plan = _any_plan(source, **{name: bound for name, bound in bounds.items() if bound is not None})
        plan.save(out)
    show(plan)
    tell(f"written to {out}")


@plans.command()
def diff(
    first: Annotated[str, typer.Argument(help="A plan, or a file that convert takes.")],
    second: Annotated[str, typer.Argument(help="Another one, of the same shape.")],
) -> None:
    """Compare two plans, head by head. The exit status is 1 if they differ."""
    with told():
        a, b = _any_plan(first), _any_plan(second)
        if [len(layer) for layer in a] != [len(layer) for layer in b]:
            raise ValueError(f"the plans have other shapes: {a!r} and {b!r}")
    from rich.table import Table

    heads = [
        (i, h, x, y)
        for i, (p, q) in enumerate(zip(a, b, strict=True))
        for h, (x, y) in enumerate(zip(p, q, strict=True))
    ]
    both = sum(x.is_global and y.is_global for _, _, x, y in heads)
    either = sum(x.is_global or y.is_global for _, _, x, y in heads)
    table = Table("layer", "KV head", Path(first).name, Path(second).name)
    for layer, head, x, y in heads:
        if x != y:
            table.add_row(str(layer), str(head), _text(x), _text(y))
    if table.row_count:
        console().print(table)
    overlap = f"{both / either:.2f}" if either else "1.00"
    tell(f"{table.row_count} of {len(heads)} heads differ; overlap of global heads (Jaccard) {overlap}")
    raise typer.Exit(1 if table.row_count else 0)


def _any_plan(name: str, **bound: Any) -> Any:
    """A plan of any file that holds one, or that one follows from."""
    from redknot_hf.plan.duo_attention import published
    from redknot_hf.plan.json_file import read_json
    from redknot_hf.plan.plan import HeadPlan
    from redknot_hf.profiling import HeadProfile
    from redknot_hf.profiling.profile_file import FORMAT

    path = Path(name)
    elsewhere = "://" in name or (published(name) is not None and not path.exists())
    if elsewhere or path.is_dir() or path.suffix == ".tsv":
        return HeadPlan.from_duo_attention(name, **(bound or {"global_ratio": 0.5}))
    data = read_json(path, "give a plan, a profile, or a file that convert takes")
    if data.get("format") == FORMAT:
        return HeadProfile.load(path).plan(**bound)
    if bound:
        raise ValueError(f"{path}: {next(iter(bound))} is for profiles and for scores, and this file has neither")
    return HeadPlan.from_redknot(path) if "kv_head_classification" in data else HeadPlan.load(path)


def _text(spec: Any) -> str:
    if spec.is_global:
        return "global" if spec.storage == "model" else f"global, {spec.storage}"
    return f"{spec.sink} + {spec.window}"
