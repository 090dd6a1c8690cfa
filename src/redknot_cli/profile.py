"""`redknot profile`: find the heads that need everything, and write a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .terminal import fail, progress, show, tell, told


def profile(  # noqa: PLR0913 - every one is an option of the command
    model: options.Model,
    out: options.Out,
    budget: options.Budget = None,
    global_ratio: options.Ratio = None,
    bytes_per_token: options.Bytes = None,
    max_kl: Annotated[
        float, typer.Option(help="KL, nats a token, that a plan which holds may be off; without a bound, the smallest")
    ] = options.MAX_KL,
    method: Annotated[str, typer.Option(help="drift; fisher, to try for few bytes; loss, mass, gates.")] = "drift",
    windows: Annotated[str | None, typer.Option(help="Of local heads; 64,256,1024 and a quarter of --length.")] = None,
    sink: Annotated[int, typer.Option(help="First tokens that local heads keep.")] = 4,
    storages: Annotated[str, typer.Option(help="That heads which keep everything may take: int8,int4.")] = "",
    length: Annotated[int, typer.Option(help="Tokens of a prompt: the length that will be served.")] = 4096,
    prompts: Annotated[int, typer.Option(help="A quarter, one of every kind at least, is held out.")] = 16,
    kinds: options.Kinds = None,
    texts: options.Texts = None,
    check_length: Annotated[list[int] | None, typer.Option(help="Confirm the plan at this length too.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time for the whole run, about.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of gates.")] = 100,
    checkpoint: Annotated[Path | None, typer.Option(help="File that the training of gates goes on from.")] = None,
    profile_out: Annotated[Path | None, typer.Option(help="File to write the profile to, for other budgets.")] = None,
    card: Annotated[Path | None, typer.Option(help="Markdown file to write the plan's card to.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Picture to draw the heat map to.")] = None,
    revision: options.Revision = None,
    gguf_file: options.Gguf = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
) -> None:
    """Find the heads of MODEL that need everything, and write a plan: for a budget, or the smallest that holds."""
    with told():
        from torch import OutOfMemoryError

        from redknot_hf.plan.card import card as plan_card
        from redknot_hf.profiling import profile_heads
        from redknot_hf.profiling.figure import check_plotting, heat_map
        from redknot_hf.profiling.prompt import held_apart

        from .loading import Asked, Source

        bounds: dict[str, Any] = {"budget": budget, "global_ratio": global_ratio, "max_kl": max_kl}
        bounds |= {"bytes_per_token": bytes_per_token}
        _check_folders(
            {"out": out, "profile-out": profile_out, "card": card, "figure": figure, "checkpoint": checkpoint}
        )
        widths, source = _numbers(windows), Source(model, revision, gguf_file, dtype, device)
        _check_asked({"budget": budget, "global_ratio": global_ratio, "bytes_per_token": bytes_per_token}, method)
        if figure:
            check_plotting()
        asked = Asked.of(source.tokenizer(), kinds, texts)
        measured, held_out = held_apart(asked.prompts(length, prompts, seed))
        for other in check_length or ():
            held_out += asked.prompts(other, max(2, prompts // 4, len(asked.kinds)), seed + 1)
        loaded = source.model()
        try:
            with progress() as report:
                found = profile_heads(
                    loaded, measured, **bounds, windows=widths, sink=sink, storages=_names(storages), method=method,
                    held_out=held_out or None, seconds=seconds, steps=steps, checkpoint=checkpoint, report=report,
                )  # fmt: skip
        except OutOfMemoryError as e:
            fail(e)
        plan = found.plan()
        plan.save(out)
        if card:
            card.write_text(plan_card(plan), encoding="utf-8")
        if profile_out:
            found.save(profile_out)
        if figure:
            heat_map(found, plan).savefig(figure, dpi=150)
    tell(str(found).removesuffix(str(plan)).rstrip())
    show(plan)
    tell(f"written to {out}")


def _check_asked(bounds: dict[str, float | None], method: str) -> None:
    """Checks, before anything is loaded, what the profile would refuse."""
    from redknot_hf.profiling.head_profile import check_target
    from redknot_hf.profiling.profiler import METHODS

    if method not in METHODS:
        raise ValueError(f"--method {method}: choose one of {', '.join(METHODS)}")
    if given := {name: bound for name, bound in bounds.items() if bound is not None}:
        check_target(given)


def _check_folders(files: dict[str, Path | None]) -> None:
    """Checks that what is found can be written, which is known only at the end otherwise."""
    for name, file in files.items():
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"--{name} {file}: there is no folder {file.parent}; make it, or name another")


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _numbers(windows: str | None) -> list[int] | None:
    try:
        return None if windows is None else [int(window) for window in windows.split(",")]
    except ValueError as e:
        raise ValueError(f"--windows {windows}: give numbers of tokens with commas between, such as 64,256") from e
