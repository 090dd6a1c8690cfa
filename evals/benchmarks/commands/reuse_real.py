"""What reuse of stored documents costs a pretrained model in answers: SmolLM2-135M-Instruct, all heads global.

    python -m evals.real fetch
    python -m evals bench reuse_real --out runs/real/reuse.jsonl
    python -m evals.real summarize-reuse runs/real/reuse.jsonl --out evals/results/reuse_real.jsonl

Every context is an opening and documents of English text (Python's own reference) with facts hidden in them: numbers
and words, which stand in one document each, and friends, of whom a question needs two documents. Each question is
asked right behind the context. `copy` asks for what follows a passage, `text` for how the last document goes on,
`summary` for what dense says a document is about; they are judged by KL. All methods see the same questions and are
held against a dense prefill of the context (DynamicCache, SDPA); answers are judged under their true beginning.
Stand-ins are made of other contexts' documents. A retriever ranks the document of the answer first or second, by
chance. Intervals are 95 %, by bootstrap over contexts.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.benchmarks.options import Device, Out, command, place_of
from evals.real.contexts import KINDS
from evals.real.model import FOLDER, folder

app = command()


@app.command(help=__doc__)
def main(
    contexts: Annotated[int, typer.Option(help="how many")] = 26,
    first: Annotated[int, typer.Option(help="number of the first: runs of other numbers add to it")] = 0,
    documents: Annotated[int, typer.Option(help="a context")] = 8,
    tokens: Annotated[int, typer.Option(help="a document")] = 500,
    kinds: Annotated[list[str], typer.Option("--kind", help=f"of {', '.join(KINDS)}")] = list(KINDS),
    names: Annotated[list[str], typer.Option("--method", help="by name; all, unless said otherwise")] = [],
    model: Annotated[Path, typer.Option(help="folder of the model")] = FOLDER,
    seconds: Annotated[float, typer.Option(help="no context is begun later")] = float("inf"),
    dtype: Annotated[str, typer.Option(help="a torch dtype")] = "bfloat16",
    device: Device = None,
    out: Out = None,
) -> None:
    """Measures, prints tables, and appends a row a context, method and kind to a file, as they are measured."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evals.benchmarks.reuse import Case
    from evals.benchmarks.reuse_real import STAND_IN, measure, methods
    from evals.identity import hardware, versions
    from evals.intervals import check_intervals
    from evals.real.contexts import Maker
    from evals.real.reuse_summary import records, table
    from redknot_hf import StandIn

    place = place_of(device)
    check_intervals(contexts)
    tokenizer = AutoTokenizer.from_pretrained(folder(model))
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="redknot")
    loaded.to(place)
    chosen = {name: method for name, method in methods().items() if not names or name in names}
    maker = Maker(tokenizer)
    made = []
    for seed in range(first, first + contexts):
        read, questions = maker.context(seed, documents, tokens, kinds)
        _, *others = maker.context(seed + 10_000, documents, tokens, ())[0]
        made.append((seed, Case("", read, questions), StandIn.of(others, STAND_IN)))  # pyright: ignore[reportArgumentType]
    about = {"documents": documents, "tokens": tokens, "stand_in": STAND_IN, "dtype": dtype}
    about |= {"model": folder(model).name, "date": time.strftime("%Y-%m-%d")}
    about |= {"hardware": {**hardware(place), **versions(("torch", "transformers"))}}
    found = []
    for row in measure(loaded, made, chosen, seconds):
        found.append({**row, **about})
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as lines:
                lines.write(json.dumps(found[-1]) + "\n")
    for one in table(records(found)):
        Console(width=130).print(one)
