"""The commands that answer tasks and judge plans: what each of their words takes.

What a command does is imported when it runs, so that help waits for neither torch nor what the extra `evals` installs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evals.limits import Limits

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="What a plan costs in fidelity, and what it gives in memory and time.",
)

Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help="names of tasks; `tasks` lists them")]
Model = Annotated[
    str, typer.Option(help="folder or Hub id; `bundled`: in evals/tiny; `smollm2`: fetched by evals.real")
]
MethodNames = Annotated[
    list[str],
    typer.Option(
        "--method", help="a method, `methods` lists them, or module.function; NAME:option=value sets options"
    ),
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
    from evals import work
    from evals.records import Records
    from evals.summary import summarize

    bench = work.load(model, chat, dtype, device)
    work.answer(bench, task, out, method, plan, length, (count, seed, batch_size, source))
    records = Records.load([out])
    work.show(summarize(records))
    work.show_failures(records)
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
    from evals.records import Records
    from evals.report import write_report
    from evals.summary import summarize
    from redknot_hf import HeadPlan
    from redknot_hf.profiling import HeadProfile

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
    from evals import work
    from evals.records import Records
    from evals.report import write_report
    from evals.summary import summarize
    from redknot_hf import HeadPlan

    records = out / "frontier.jsonl"
    work.answer(work.load(model, chat), task, records, method, plans, length, (count, seed, batch_size, None))
    drawn = [(path.name, HeadPlan.load(path)) for path in plans]
    rows = summarize(Records.load([records]))
    work.show(rows)
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
    from evals import work
    from evals.fidelity_gate import gate as pass_gate

    bench = work.load(model, chat)
    ((_, held),) = work.plans(bench, [plan] if plan else [])
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
    from evals import work
    from evals.bench import BUNDLED
    from evals.records import Records
    from evals.report import write_report
    from evals.summary import summarize
    from redknot_hf import HeadPlan
    from redknot_hf.profiling import HeadProfile

    records = out / "records.jsonl"
    work.answer(work.load("bundled"), ["tiny/plain"], records, method, [], length, (count, 0, 1, None))
    rows = summarize(Records.load([records]), kinds=True)
    work.show([row for row in rows if not row.kind])
    plan = HeadPlan.load(BUNDLED / "plan.json")
    # What the bundled model's heads were measured by, where it has been.
    measured = BUNDLED.parent / "results" / "profiling" / "bundled_loss.json"
    profiles = [(measured.name, HeadProfile.load(measured))] if measured.exists() else []
    print(write_report(rows, out, [("evals/tiny/plan.json", plan)], "The bundled model, offline", profiles))
    if results:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text((out / "summary.jsonl").read_text())


@app.command("tasks")
def list_tasks() -> None:
    """List the names of all tasks."""
    from evals import tasks

    print("\n".join(tasks.names()))


@app.command("methods")
def list_methods() -> None:
    """List the names of all methods."""
    from evals.methods import METHODS

    print("\n".join(METHODS))
