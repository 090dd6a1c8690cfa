"""Plans of windows and storages on the bundled models, for budgets of bytes: what the answers lose.

    python -m evals bench budgets --out evals/results/budgets.jsonl

The bundled model and its plainly trained twin are profiled by drift and by fisher, and plans for every budget of the
real model's frontier are judged on texts of their own, with those that are compared there. Heads see what a
RedKnotCache would give them that reads the text in chunks, pages through int8 or int4 included; bytes are those of
16-bit keys and values. A JSON line a plan: share of answer tokens right, that of the dense model, and the mean KL
divergence from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from evals.benchmarks.options import MODELS, Device, Out, command, place_of

app = command()


@app.command(help=__doc__)
def main(
    models: Annotated[list[str], typer.Option("--model", help=f"of {', '.join(MODELS)}")] = list(MODELS),
    length: Annotated[int, typer.Option(help="tokens of the texts to profile and to judge on")] = 2048,
    calibration: Annotated[int, typer.Option(help="answers to profile on")] = 96,
    answers: Annotated[int, typer.Option(help="answers that judge the plans")] = 400,
    device: Device = None,
    out: Out = None,
) -> None:
    """Measures, and appends the lines to a file."""
    import torch
    from transformers import AutoModelForCausalLM

    from evals.benchmarks.budgets import CALIBRATION, InChunks
    from evals.benchmarks.judge import prompts
    from evals.real.contenders import contenders
    from evals.real.frontier import STORAGES, parts
    from evals.result_file import write_line
    from redknot_hf.profiling import profile_heads

    place = place_of(device)
    for name in models:
        model: Any = AutoModelForCausalLM.from_pretrained(
            MODELS[name], dtype=torch.float32, attn_implementation="redknot"
        )
        model.to(place)
        texts = prompts(length, calibration, CALIBRATION)
        drift, fisher = (
            replace(profile_heads(model, texts, storages=STORAGES, method=method), itemsize=2)
            for method in ("drift", "fisher")
        )
        judge = InChunks(model, length, answers)
        for one in contenders(model.config, length, {"drift": drift, "fisher": fisher, **parts(drift)}):
            row = {"model": name, "length": length, "method": one.method, "budget": one.budget}
            row |= {"kept": round(one.kept, 4), **judge(one.plan)}
            write_line(out, {"benchmark": "budgets", **row}, place)
