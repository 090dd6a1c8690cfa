"""The `redknot` command: profile a model, look at plans, convert and compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from redknot_hf.plan.evidence import confirmed
from redknot_hf.plan.json_file import read_json
from redknot_hf.plan.plan import HeadPlan
from redknot_hf.profiling import HeadProfile, Prompt, calibration_kinds, calibration_prompts, fidelity, profile_heads
from redknot_hf.profiling.fidelity import MAX_KL
from redknot_hf.profiling.figure import check_plotting, heat_map
from redknot_hf.profiling.head_profile import check_target
from redknot_hf.profiling.profile_file import FORMAT
from redknot_hf.profiling.profiler import METHODS
from redknot_hf.profiling.prompt import held_apart
from redknot_hf.profiling.texts import read_texts
from redknot_hf.reuse.trial import Context, least, reuse_costs
from redknot_hf.terminal import progress, told

app = typer.Typer(no_args_is_help=True, help="A head-aware KV cache: which heads of a model need everything?")
plans = typer.Typer(no_args_is_help=True, help="Look at head plans, convert and compare them.")
app.add_typer(plans, name="plan")
console = Console()
# Kinds of prompts of which the facts stand in documents, and the questions behind them.
_IN_DOCUMENTS = ("passkey", "two_hop", "home")

Out = Annotated[Path, typer.Option(help="File to write the plan to.")]
Budget = Annotated[float | None, typer.Option(help="Share of the dense cache's bytes to keep, 0 to 1.")]
Ratio = Annotated[float | None, typer.Option(help="Share of the KV heads that are global, 0 to 1.")]
Bytes = Annotated[float | None, typer.Option(help="Bytes a token to keep, all heads together.")]
Model = Annotated[str, typer.Argument(help="Id on the Hub, or a folder.")]
Length = Annotated[int, typer.Option(help="Tokens of a prompt: the length that will be served.")]
Kinds = Annotated[str | None, typer.Option(help="Of passkey,pairs,two_hop,repeats,text,copy,home; all by default.")]
Texts = Annotated[str | None, typer.Option(help="Texts to ask in: a file, or a data set's id on the Hub.")]
Revision = Annotated[str | None, typer.Option(help="Of the model.")]
Dtype = Annotated[str, typer.Option(help="Of the model.")]
Device = Annotated[str | None, typer.Option(help="By default a GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Of the prompts.")]


@app.command()
def profile(  # noqa: PLR0913 - every one is an option of the command
    model: Model,
    out: Out,
    budget: Budget = None,
    global_ratio: Ratio = None,
    bytes_per_token: Bytes = None,
    max_kl: Annotated[
        float, typer.Option(help="KL, nats a token, that a plan which holds may be off; without a bound, the smallest")
    ] = MAX_KL,
    method: Annotated[str, typer.Option(help="drift (minutes), loss (longer), mass or gates.")] = "drift",
    windows: Annotated[str | None, typer.Option(help="Of local heads; 64,256,1024 and a quarter of --length.")] = None,
    sink: Annotated[int, typer.Option(help="First tokens that local heads keep.")] = 4,
    storages: Annotated[str, typer.Option(help="That heads which keep everything may take: int8,int4.")] = "",
    length: Length = 4096,
    prompts: Annotated[int, typer.Option(help="A quarter, one of every kind at least, is held out.")] = 16,
    kinds: Kinds = None,
    texts: Texts = None,
    check_length: Annotated[list[int] | None, typer.Option(help="Confirm the plan at this length too.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time for the whole run, about.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of gates.")] = 100,
    checkpoint: Annotated[Path | None, typer.Option(help="File that the training of gates goes on from.")] = None,
    profile_out: Annotated[Path | None, typer.Option(help="File to write the profile to, for other budgets.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Picture to draw the heat map to.")] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Find the heads of MODEL that need everything, and write a plan: for a budget, or the smallest that holds."""
    with told():
        bounds: dict[str, Any] = {"budget": budget, "global_ratio": global_ratio, "max_kl": max_kl}
        bounds |= {"bytes_per_token": bytes_per_token}
        widths, options = _numbers(windows), _options(dtype, device)
        _check_asked({"budget": budget, "global_ratio": global_ratio, "bytes_per_token": bytes_per_token}, method)
        if figure:
            check_plotting()
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        asked = Asked(tokenizer, kinds.split(",") if kinds else None, read_texts(texts) if texts else ())
        measured, held_out = held_apart(asked.prompts(length, prompts, seed))
        for other in check_length or ():
            held_out += asked.prompts(other, max(2, prompts // 4, len(asked.kinds)), seed + 1)
        loaded = _load(model, revision, options)
        with progress() as report:
            found = profile_heads(
                loaded, measured, **bounds, windows=widths, sink=sink, storages=_names(storages), method=method,
                held_out=held_out or None, seconds=seconds, steps=steps, checkpoint=checkpoint, report=report,
            )  # fmt: skip
        plan = found.plan()
        plan.save(out)
        if profile_out:
            found.save(profile_out)
        if figure:
            heat_map(found, plan).savefig(figure, dpi=150)
    console.print(str(found).removesuffix(str(plan)).rstrip(), markup=False, highlight=False)
    _show(plan)
    console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def gate(  # noqa: PLR0913 - every one is an option of the command
    model: Model,
    plan: Annotated[Path, typer.Option(help="The plan to pass or fail.")],
    length: Annotated[list[int], typer.Option(help="Tokens of a prompt; may be given again.")] = [4096],  # noqa: B006
    prompts: Annotated[int, typer.Option(help="Number of prompts of each length.")] = 18,
    kinds: Kinds = None,
    texts: Texts = None,
    max_kl: Annotated[float, typer.Option(help="KL, nats a token, that a plan which holds may be off.")] = MAX_KL,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Not the plan, but reuse of documents under it: what must be recomputed?")
    ] = False,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 1_000_000,
) -> None:
    """Pass or fail a plan on questions and texts, kind by kind; the exit status is 1 if it does not hold."""
    if reuse and kinds is None:
        kinds = ",".join(_IN_DOCUMENTS)
    with told():
        held, options = HeadPlan.load(plan), _options(dtype, device)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        asked = Asked(tokenizer, kinds.split(",") if kinds else None, read_texts(texts) if texts else ())
        inputs = [prompt for n in length for prompt in asked.prompts(n, prompts, seed)]
        loaded = _load(model, revision, options)
        held.check(loaded.config)
        if reuse:
            raise typer.Exit(_reuse_gate(loaded, held, inputs, max_kl))
        rows = fidelity(loaded, held, inputs, max_kl)
    for line in (line for row in rows for line in confirmed(row)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if all(row["holds"] for row in rows) else 1)


def _reuse_gate(model: Any, plan: HeadPlan, inputs: Sequence[Prompt], max_kl: float) -> int:
    """Says what reuse costs by what is recomputed; 1 if nothing keeps it within the KL."""
    costs = reuse_costs(model, plan, [Context.of(prompt.ids, prompt.targets) for prompt in inputs])
    enough, said = least(costs, max_kl)
    for line in (*map(str, costs), said):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if enough is None else 0


@dataclass(frozen=True)
class Asked:
    """What prompts are made of."""

    tokenizer: Any
    named: Sequence[str] | None
    texts: Sequence[str]

    @cached_property
    def kinds(self) -> Sequence[str]:
        """Of which they are."""
        return self.named or calibration_kinds(self.texts, self.tokenizer)

    def prompts(self, length: int, count: int, seed: int) -> list[Prompt]:
        """So many of them."""
        return calibration_prompts(
            self.tokenizer, length=length, count=count, kinds=self.kinds, texts=self.texts, seed=seed
        )


def _options(dtype: str, device: str | None) -> tuple[Any, torch.device]:
    """Checks both before anything is loaded."""
    found = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(found, str | torch.dtype):
        raise ValueError(f"--dtype {dtype}: give auto, float32, bfloat16 or float16")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {device}: {str(e).splitlines()[0]}; give cpu, or leave it out") from e
    return found, torch.device(device)


def _check_asked(bounds: dict[str, float | None], method: str) -> None:
    """Checks, before anything is loaded, what the profile would refuse."""
    if method not in METHODS:
        raise ValueError(f"--method {method}: choose one of {', '.join(METHODS)}")
    if given := {name: bound for name, bound in bounds.items() if bound is not None}:
        check_target(given)


def _load(model: str, revision: str | None, options: tuple[Any, torch.device]) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, revision=revision, dtype=options[0], attn_implementation="redknot"
    )
    return loaded.to(options[1])


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _numbers(windows: str | None) -> list[int] | None:
    try:
        return None if windows is None else [int(window) for window in windows.split(",")]
    except ValueError as e:
        raise ValueError(f"--windows {windows}: give numbers of tokens with commas between, such as 64,256") from e


@plans.command()
def show(plan: Annotated[Path, typer.Argument(help="A plan, or a file that convert takes.")]) -> None:
    """Print a plan: which heads are global, what it keeps, and where it comes from."""
    with told():
        loaded = _any_plan(plan)
    _show(loaded)


@plans.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A profile, RedKnot's head classes, or DuoAttention's scores.")],
    out: Out,
    budget: Budget = None,
    global_ratio: Ratio = None,
    bytes_per_token: Bytes = None,
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
    _show(plan)
    console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)


@plans.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A plan, or a file that convert takes.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same shape.")],
) -> None:
    """Compare two plans, head by head. The exit status is 1 if they differ."""
    with told():
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


def _any_plan(path: Path, **bound: Any) -> HeadPlan:
    """A plan of any file that holds one, or that one follows from."""
    if path.is_dir() or path.suffix == ".tsv":
        return HeadPlan.from_duo_attention(path, **(bound or {"global_ratio": 0.5}))
    data = read_json(path, "give a plan, a profile, or a file that convert takes")
    if data.get("format") == FORMAT:
        return HeadProfile.load(path).plan(**bound)
    if bound:
        raise ValueError(f"{path}: {next(iter(bound))} is for profiles and for scores, and this file has neither")
    return HeadPlan.from_redknot(path) if "kv_head_classification" in data else HeadPlan.load(path)


def _show(plan: HeadPlan) -> None:
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
    for name, entry in plan.provenance.items():
        if name not in ("held_out", "overlap"):
            console.print(f"{name}: {entry}", markup=False, highlight=False, soft_wrap=True)


def _text(spec: Any) -> str:
    if spec.is_global:
        return "global" if spec.storage == "model" else f"global, {spec.storage}"
    return f"{spec.sink} + {spec.window}"


if __name__ == "__main__":
    app()
