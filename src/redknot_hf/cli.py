"""The `redknot` command: profile a model, look at plans, convert and compare them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from redknot_hf.plan.plan import HeadPlan
from redknot_hf.profiling.head_profile import FORMAT

from .profiling import HeadProfile, Prompt, calibration_prompts, profile_heads, read_texts

app = typer.Typer(no_args_is_help=True, help="A head-aware KV cache: which heads of a model need everything?")
plans = typer.Typer(no_args_is_help=True, help="Look at head plans, convert and compare them.")
app.add_typer(plans, name="plan")
console = Console()

Out = Annotated[Path, typer.Option(help="File to write the plan to.")]
Budget = Annotated[float | None, typer.Option(help="Share of the dense cache's bytes to keep, 0 to 1.")]
Ratio = Annotated[float | None, typer.Option(help="Share of the KV heads that are global, 0 to 1.")]
Bytes = Annotated[float | None, typer.Option(help="Bytes a token to keep, all heads together.")]


@app.command()
def profile(  # noqa: PLR0913 - every one is an option of the command
    model: Annotated[str, typer.Argument(help="Id on the Hub, or a folder.")],
    out: Out,
    budget: Budget = None,
    global_ratio: Ratio = None,
    bytes_per_token: Bytes = None,
    method: Annotated[str, typer.Option(help="drift (minutes), loss (best, longer), mass or gates.")] = "drift",
    windows: Annotated[str, typer.Option(help="Candidate windows of local heads.")] = "128,256,512,1024",
    sink: Annotated[int, typer.Option(help="First tokens that local heads keep.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 4096,
    prompts: Annotated[int, typer.Option(help="Number of prompts; every fourth is held out.")] = 8,
    kinds: Annotated[str | None, typer.Option(help="passkey,pairs,two_hop,repeats,text; all by default.")] = None,
    texts: Annotated[str | None, typer.Option(help="Texts to mix in: a file, or a data set's id on the Hub.")] = None,
    check_length: Annotated[list[int] | None, typer.Option(help="Confirm the plan at this length too.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for the search of loss, or to train gates; about.")] = 800.0,
    steps: Annotated[int, typer.Option(help="Training steps of gates.")] = 100,
    checkpoint: Annotated[Path | None, typer.Option(help="File that the training of gates goes on from.")] = None,
    profile_out: Annotated[Path | None, typer.Option(help="File to write the profile to, for other budgets.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Picture to draw the heat map to.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "auto",
    device: Annotated[str | None, typer.Option(help="By default a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
) -> None:
    """Find the heads of MODEL that need everything, and write a plan."""
    with _told():
        if budget is None and global_ratio is None and bytes_per_token is None:
            raise ValueError("give a bound: --budget, --global-ratio or --bytes-per-token, such as --budget 0.25")
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        read = read_texts(texts) if texts else ()
        options: dict[str, Any] = {"kinds": kinds.split(",") if kinds else None, "texts": read}
        inputs = calibration_prompts(tokenizer, length=length, count=prompts, seed=seed, **options)
        held_out = _held_out(inputs, [
            calibration_prompts(tokenizer, length=n, count=max(2, prompts // 4), seed=seed + 1, **options)
            for n in check_length or ()
        ])  # fmt: skip
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=dtype, attn_implementation="redknot"
        )
        loaded.to(device)
        with _progress() as report:
            found = profile_heads(
                loaded, held_out[0], budget=budget, global_ratio=global_ratio, bytes_per_token=bytes_per_token,
                windows=[int(window) for window in windows.split(",")], sink=sink, method=method,
                held_out=held_out[1], seconds=seconds, steps=steps, checkpoint=checkpoint, report=report,
            )  # fmt: skip
        plan = found.plan()
        plan.save(out)
        if profile_out:
            found.save(profile_out)
        if figure:
            from redknot_hf.profiling.figure import heat_map

            heat_map(found, plan).savefig(figure, dpi=150)
    _show(plan)
    console.print(f"written to {out}", highlight=False)


@plans.command()
def show(plan: Annotated[Path, typer.Argument(help="A plan, or a file that convert takes.")]) -> None:
    """Print a plan: which heads are global, what it keeps, and where it comes from."""
    with _told():
        loaded = _any_plan(plan)
    _show(loaded)


@plans.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A profile, RedKnot's head classes, or DuoAttention's scores.")],
    out: Out,
    budget: Budget = None,
    global_ratio: Ratio = None,
    bytes_per_token: Bytes = None,
    max_error: Annotated[float | None, typer.Option(help="Largest error of a profile's local heads.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Least score of a global head of DuoAttention.")] = None,
) -> None:
    """Write a plan from a profile (for a budget), from RedKnot's head classes or from DuoAttention's scores."""
    bounds = {"budget": budget, "global_ratio": global_ratio, "bytes_per_token": bytes_per_token}
    bounds |= {"max_error": max_error, "threshold": threshold}
    with _told():
        plan = _any_plan(source, **{name: bound for name, bound in bounds.items() if bound is not None})
        plan.save(out)
    _show(plan)
    console.print(f"written to {out}", highlight=False)


@plans.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A plan, or a file that convert takes.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same shape.")],
) -> None:
    """Compare two plans, head by head. The exit status is 1 if they differ."""
    with _told():
        a, b = _any_plan(first), _any_plan(second)
        if [len(layer) for layer in a] != [len(layer) for layer in b]:
            raise ValueError(f"the plans have other shapes: {a!r} and {b!r}")
    heads = [
        (i, h, x, y)
        for i, (p, q) in enumerate(zip(a, b, strict=True))
        for h, (x, y) in enumerate(zip(p, q, strict=True))
    ]
    both = sum(x.is_global and y.is_global for _, _, x, y in heads)
    either = sum(x.is_global or y.is_global for _, _, x, y in heads)
    table = Table("layer", "KV head", first.name, second.name)
    for layer, head, x, y in heads:
        if x != y:
            table.add_row(str(layer), str(head), _text(x), _text(y))
    if table.row_count:
        console.print(table)
    overlap = f"{both / either:.2f}" if either else "1.00"
    console.print(f"{table.row_count} of {len(heads)} heads differ; overlap of global heads (Jaccard) {overlap}")
    raise typer.Exit(1 if table.row_count else 0)


def _any_plan(path: Path, **bound: float) -> HeadPlan:
    """A plan of any file that holds one, or that one follows from."""
    if path.is_dir() or path.suffix == ".tsv":
        return HeadPlan.from_duo_attention(path, **(bound or {"global_ratio": 0.5}))
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("format") == FORMAT:
        return HeadProfile.load(path).plan(**bound)
    if bound:
        raise ValueError(f"{path}: {next(iter(bound))} is for profiles and for scores, and this file has neither")
    return HeadPlan.from_redknot(path) if "kv_head_classification" in data else HeadPlan.load(path)


def _held_out(inputs: list[Prompt], longer: list[list[Prompt]]) -> tuple[list[Prompt], list[Prompt] | None]:
    """What to measure on, and what to confirm on: every fourth prompt, and those of other lengths."""
    if not longer:
        return inputs, None
    rest = [prompt for i, prompt in enumerate(inputs) if i % 4 != 3]
    return rest, inputs[3::4] + [prompt for prompts in longer for prompt in prompts]


def _show(plan: HeadPlan) -> None:
    console.print(str(plan), markup=False, highlight=False)
    for name, entry in plan.provenance.items():
        if name != "held_out":
            console.print(f"{name}: {entry}", markup=False, highlight=False)
    for found in plan.provenance.get("held_out", ()):
        at = f"held out, {found['length']} tokens: KL {found['kl']:.4f}, right {found['accuracy']:.1%}"
        at += f" (dense {found['dense_accuracy']:.1%})"
        console.print(at + ("" if found["holds"] else "  [red]the plan does not hold at this length[/red]"))


def _text(spec: Any) -> str:
    if spec.is_global:
        return "global" if spec.storage == "model" else f"global, {spec.storage}"
    return f"{spec.sink} + {spec.window}"


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong with the input is said in a line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as e:
        Console(stderr=True).print(f"[red]error:[/red] {e}", highlight=False)
        raise typer.Exit(2) from e


@contextmanager
def _progress() -> Iterator[Any]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


if __name__ == "__main__":
    app()
