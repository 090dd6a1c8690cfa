"""`redknot gate`: pass or fail a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .terminal import tell, told

# Kinds of prompts of which the facts stand in documents, and the questions behind them.
_IN_DOCUMENTS = ("passkey", "two_hop", "home")


def gate(  # noqa: PLR0913 - every one is an option of the command
    model: options.Model,
    plan: Annotated[Path, typer.Option(help="The plan to pass or fail.")],
    length: Annotated[list[int], typer.Option(help="Tokens of a prompt; may be given again.")] = [4096],  # noqa: B006
    prompts: Annotated[int, typer.Option(help="Number of prompts of each length.")] = 18,
    kinds: options.Kinds = None,
    texts: options.Texts = None,
    max_kl: options.MaxKL = options.MAX_KL,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Not the plan, but reuse of documents under it: what must be recomputed?")
    ] = False,
    revision: options.Revision = None,
    gguf_file: options.Gguf = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 1_000_000,
) -> None:
    """Pass or fail a plan on questions and texts, kind by kind; the exit status is 1 if it does not hold."""
    if reuse and kinds is None:
        kinds = ",".join(_IN_DOCUMENTS)
    with told():
        from redknot_hf.plan.evidence import confirmed
        from redknot_hf.plan.plan import HeadPlan
        from redknot_hf.profiling import fidelity

        from .loading import Asked, Source

        held, source = HeadPlan.load(plan), Source(model, revision, gguf_file, dtype, device)
        asked = Asked.of(source.tokenizer(), kinds, texts)
        inputs = [prompt for n in length for prompt in asked.prompts(n, prompts, seed)]
        loaded = source.model()
        held.check(loaded.config)
        if reuse:
            raise typer.Exit(_reuse_gate(loaded, held, inputs, max_kl))
        rows = fidelity(loaded, held, inputs, max_kl)
    for line in (line for row in rows for line in confirmed(row)):
        tell(line)
    raise typer.Exit(0 if all(row["holds"] for row in rows) else 1)


def _reuse_gate(model: Any, plan: Any, inputs: Sequence[Any], max_kl: float) -> int:
    """Says what reuse costs by what is recomputed; 1 if nothing keeps it within the KL."""
    from redknot_hf.reuse.trial import Context, least, reuse_costs

    costs = reuse_costs(model, plan, [Context.of(prompt.ids, prompt.targets) for prompt in inputs])
    enough, said = least(costs, max_kl)
    for line in (*map(str, costs), said):
        tell(line)
    return 1 if enough is None else 0
