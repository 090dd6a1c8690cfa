"""The commands that answer tasks and judge plans; they need what the extra `evals` installs."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from evals import tasks
from evals.bench import BUNDLED, Bench, load_bench
from evals.fidelity import AuditError
from evals.fidelity_gate import Limits
from evals.fidelity_gate import gate as pass_gate
from evals.methods import METHODS, Setting, load_all
from evals.records import RecordFile, Records
from evals.report import write_report
from evals.running import Plan, UnwritableError
from evals.running import run as run_task
from evals.summary import Row, summarize
from redknot_hf import HeadPlan
from redknot_hf.profiling import HeadProfile

# What the bundled model's heads were measured by, where it has been.
PROFILE = BUNDLED.parent / "results" / "profiling" / "bundled_loss.json"

app = typer.Typer()

Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help="names of tasks; `tasks` lists them")]
Model = Annotated[
    str, typer.Option(help="folder or Hub id; `bundled`: in evals/tiny; `smollm2`: fetched by evals.real")
]
MethodNames = Annotated[
    list[str], typer.Option("--method", help=f"of {', '.join(METHODS)}; NAME:option=value sets options")
]
Plans = Annotated[list[Path], typer.Option("--plan", help="head plan; the bundled model's is the default for it")]
Lengths = Annotated[list[int], typer.Option("--length", help="tokens of a prompt, at most")]
Count = Annotated[int, typer.Option(min=1, help="examples of each task and length")]
Batch = Annotated[int, typer.Option(min=1, help="questions that are answered together")]
Seed = Annotated[int, typer.Option(help="of the examples")]
Dtype = Annotated[str, typer.Option(help="a torch dtype; auto is float32 on CPUs")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one")]
Chat = Annotated[bool, typer.Option("--chat", help="ask in the words of the model's chat template")]
Source = Annotated[str | None, typer.Option(help="local file or folder that the task reads in place of the Hub")]
OFFLINE = ("dense", "all-global", "redknot", "wrong-heads", "streaming", "adakv-expected-attention")


@app.command()
def run(  # noqa: PLR0913 - options of a command
    task: Tasks,
    out: Annotated[Path, typer.Option(help="JSON lines; what they hold already is not made again")],
    model: Model = "bundled",
    method: MethodNames = ["dense", "redknot"],  # noqa: B006 - typer copies it
    plan: Plans = [],  # noqa: B006
    length: Lengths = [4096],  # noqa: B006
    count: Count = 100,
    batch_size: Batch = 1,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    source: Source = None,
    chat: Chat = False,
) -> None:
    """Answer tasks with methods, and write down what was answered, how near to dense, at what cost."""
    bench = _load(model, chat, dtype, device)
    _run(bench, task, out, method, plan, length, (count, seed, batch_size, source))
    records = Records.load([out])
    _show(summarize(records))
    for key, reason in records.failures.items():
        failed = records.runs[key]
        Console().print(f"{failed.name} failed on {failed.task}, {failed.length} tokens: {reason}", markup=False)
    raise typer.Exit(1 if records.failures else 0)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="files that `run` has written")],
    out: Annotated[Path, typer.Option(help="folder")],
    plan: Annotated[list[Path], typer.Option("--plan", help="plans to draw")] = [],  # noqa: B006
    profile: Annotated[list[Path], typer.Option("--profile", help="profiles to draw")] = [],  # noqa: B006
    title: str = "RedKnot evaluation",
) -> None:
    """Write a report: Markdown, figures, and one HTML page that holds all it needs."""
    rows = summarize(Records.load(runs), kinds=True)
    drawn = [(path.name, HeadProfile.load(path)) for path in profile]
    print(write_report(rows, out, [(path.name, HeadPlan.load(path)) for path in plan], title, drawn))


@app.command()
def frontier(  # noqa: PLR0913 - options of a command
    task: Tasks,
    out: Annotated[Path, typer.Option(help="folder for the records and the report")],
    plans: Annotated[list[Path], typer.Option("--plans", help="head plans to compare")],
    model: Model = "bundled",
    method: MethodNames = ["dense", "redknot", "streaming"],  # noqa: B006
    length: Lengths = [4096],  # noqa: B006
    count: Count = 100,
    batch_size: Batch = 1,
    seed: Seed = 0,
    chat: Chat = False,
) -> None:
    """Draw fidelity over resident bytes for several plans and methods, and the classes of their heads."""
    records = out / "frontier.jsonl"
    _run(_load(model, chat), task, records, method, plans, length, (count, seed, batch_size, None))
    drawn = [(path.name, HeadPlan.load(path)) for path in plans]
    rows = summarize(Records.load([records]))
    _show(rows)
    print(write_report(rows, out, drawn, "Fidelity and memory"))


@app.command()
def gate(  # noqa: PLR0913 - options of a command
    plan: Annotated[Path | None, typer.Option(help="head plan; the bundled model's is the default for it")] = None,
    model: Model = "bundled",
    task: str = "tiny/plain",
    length: int = 4096,
    count: Count = 120,
    batch_size: Batch = 1,
    seed: Seed = 0,
    chat: Chat = False,
    points: Annotated[float, typer.Option(help="most points of score that may be lost")] = Limits.points,
    top1: Annotated[float, typer.Option(help="least share of tokens as dense, in points")] = Limits.top1,
    kl: Annotated[float, typer.Option(help="most mean KL of a token, in nats")] = Limits.kl,
) -> None:
    """Pass or fail a plan, with the figures; the exit status is 1 if it fails."""
    bench = _load(model, chat)
    ((_, held),) = _plans(bench, [plan] if plan else [])
    passage = pass_gate(
        bench.model, held, tokenizer=bench.tokenizer, task=task, length=length, count=count, seed=seed,
        batch_size=batch_size, limits=Limits(points, top1, kl), name=bench.name, chat=chat,
    )  # fmt: skip
    print(passage)
    raise typer.Exit(0 if passage.passed else 1)


@app.command()
def offline(
    out: Annotated[Path, typer.Option(help="folder for the records and the report")] = Path("runs/offline"),
    results: Annotated[Path | None, typer.Option(help="file for the figures with intervals, replaced")] = None,
    count: Count = 312,
    length: Lengths = [4096, 8192],  # noqa: B006
    method: MethodNames = list(OFFLINE),  # noqa: B006
) -> None:
    """Evaluate the bundled model without a network, as `make evals` does."""
    records = out / "records.jsonl"
    _run(load_bench("bundled"), ["tiny/plain"], records, method, [], length, (count, 0, 1, None))
    rows = summarize(Records.load([records]), kinds=True)
    _show([row for row in rows if not row.kind])
    plan = HeadPlan.load(BUNDLED / "plan.json")
    profiles = [(PROFILE.name, HeadProfile.load(PROFILE))] if PROFILE.exists() else []
    print(write_report(rows, out, [("evals/tiny/plan.json", plan)], "The bundled model, offline", profiles))
    if results:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text((out / "summary.jsonl").read_text())


@app.command("tasks")
def list_tasks() -> None:
    """List the names of all tasks."""
    print("\n".join(tasks.names()))


def _load(model: str, chat: bool, dtype: str = "auto", device: str | None = None) -> Bench:
    try:
        return load_bench(model, dtype, device, chat)
    except (ValueError, FileNotFoundError) as e:
        raise SystemExit(f"error: {e}") from e


def _run(
    bench: Bench,
    names: list[str],
    out: Path,
    methods: list[str],
    plans: list[Path],
    lengths: list[int],
    how: tuple[int, int, int, str | None],
) -> None:
    count, seed, batch_size, source = how
    left_out: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        held = _plans(bench, plans)
        with RecordFile(out) as file, Progress(*columns, console=Console(stderr=True)) as progress:
            for name in names:
                for length in lengths:
                    path, plan = held[0] if held else (None, None)
                    found = load_all(methods, Setting(bench.model.config, length, plan, path), held)
                    work = Plan(tasks.load(name, source), length, count, seed, batch_size)
                    try:
                        run_task(bench, work, found, file, progress, go_on=True)
                    except UnwritableError as e:
                        left_out.append(f"{e}")
    except (AuditError, ValueError, ImportError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    if len(left_out) == len(names) * len(lengths):
        raise SystemExit(f"error: {left_out[0]}")
    for reason in left_out:
        Console(stderr=True).print(f"left out: {reason}", markup=False)


def _plans(bench: Bench, paths: list[Path]) -> list[tuple[Path, HeadPlan]]:
    if not paths and bench.name == "bundled":
        paths = [BUNDLED / "plan.json"]
    return [(path, HeadPlan.load(path, bench.model.config)) for path in paths]


def _show(rows: list[Row]) -> None:
    """Print the figures that matter most, a table for each task and length."""
    for (task, length), same in groupby(rows, key=lambda row: (row.run.task, row.run.length)):
        numbers = (Column(name, justify="right") for name in ("answers", "score", "top-1 %", "KL", "MiB", "ms/token"))
        table = Table("method", *numbers, Column("score to dense", min_width=20), title=f"{task}, {length} tokens")
        for row in same:
            table.add_row(
                row.name, str(row.answers), f"{row.score.value:.1f}", f"{row.top1.value:.1f}", f"{row.kl.value:.2g}",
                f"{row.resident_bytes / 2**20:.1f}", "-" if row.token_s is None else f"{1e3 * row.token_s:.1f}",
                row.verdict,
            )  # fmt: skip
        Console().print(table)
