"""What reusing stored documents costs in quality, and saves in time, by how much of them is recomputed.

    python -m evals bench reuse --out evals/results/reuse.jsonl --figure evals/results/reuse.png

Every context is 8 documents of 1K tokens in the bundled model's language, and 24 questions; single facts, with the
documents in random order, and facts that run through several documents, in theirs, are reported apart. All methods
see the same questions. `read whole` is what they are held against: the whole context read under the same plan. Answers
are judged under their true beginning, so an answer is right if greedy decoding would have written it. Intervals are
95 %, by bootstrap over contexts. Times are of building the cache: `cold` with storing all documents, `hot` with them
in memory.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.benchmarks.options import TINY, Device, Out, command, place_of

app = command()


@app.command(help=__doc__)
def main(
    contexts: Annotated[int, typer.Option(help="contexts of single facts")] = 21,
    dependent: Annotated[int, typer.Option(help="contexts of dependent facts")] = 21,
    documents: Annotated[int, typer.Option(help="a context")] = 8,
    tokens: Annotated[int, typer.Option(help="a document")] = 1024,
    questions: Annotated[int, typer.Option(help="a context")] = 24,
    names: Annotated[list[str], typer.Option("--method", help="by name; all, unless said otherwise")] = [],
    plan: Annotated[Path, typer.Option(help="head plan")] = TINY / "plan.json",
    device: Device = None,
    out: Out = None,
    figure: Annotated[Path | None, typer.Option(help="file for the figure")] = None,
) -> None:
    """Measures, prints tables, and writes what was asked for; the records are appended."""
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from evals.benchmarks.reuse import cases, measure, methods
    from evals.benchmarks.reuse_figures import PARTS, draw, summary, table
    from evals.intervals import check_intervals
    from evals.result_file import write_line
    from redknot_hf import HeadPlan

    place = place_of(device)
    check_intervals(max(contexts, dependent))
    disable_progress_bar()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="redknot")
    model.to(place)
    held = HeadPlan.load(plan, model.config)
    chosen = {name: method for name, method in methods(held).items() if not names or name in names}
    about = {
        "documents": documents, "tokens": tokens, "plan": plan.name, "global": held.num_global,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    records = []
    for part, count in zip(PARTS, (contexts, dependent), strict=True):
        made = list(cases(part, count, documents, tokens, questions))
        if made:
            found = summary(measure(model, held, made, chosen), part, about)
            Console(width=130).print(table(found, part))
            records += found
    for record in records if out else ():
        write_line(out, record, place)
    if figure:
        draw(records, figure)
