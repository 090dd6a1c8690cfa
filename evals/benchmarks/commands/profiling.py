"""How well profiles find the heads that matter: recovery of known classes, frontier over budgets, length, stability.

    python -m evals bench profiling --figures evals/results/profiling

The bundled model's true head classes are known, since it was trained with them: it is profiled on texts of one length,
and drift on more sets of them. Its plainly trained twin is the hard case: it is profiled on texts of both lengths.
Plans are judged on texts of their own, through a RedKnotCache, by the answer tokens that are predicted right and by
the KL divergence from the dense model. Every measurement is a JSON line of `--out`; those that are there already are
not made again, so a run that stops goes on. `--figures FOLDER` draws the lines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evals.benchmarks.options import MODELS, Device, command, place_of

METHODS = ("drift", "loss", "mass", "gates")
STAGES = ("profile", "seeds", "length", "frontier")

app = command()


@app.command(help=__doc__)
def main(
    models: Annotated[list[str], typer.Option("--model", help=f"of {', '.join(MODELS)}")] = list(MODELS),
    methods: Annotated[list[str], typer.Option("--method", help=f"of {', '.join(METHODS)}")] = list(METHODS),
    stages: Annotated[list[str], typer.Option("--stage", help=f"of {', '.join(STAGES)}")] = list(STAGES),
    length: Annotated[int, typer.Option(help="tokens of the texts to profile and to judge on")] = 2048,
    long: Annotated[int, typer.Option(help="tokens of the longer texts")] = 8192,
    calibration: Annotated[int, typer.Option(help="answers to profile on")] = 96,
    long_calibration: Annotated[int, typer.Option(help="answers in longer texts for the twin")] = 288,
    confirmation: Annotated[int, typer.Option(help="answers that confirm a profile at both lengths")] = 2,
    answers: Annotated[int, typer.Option(help="answers that judge the plans at both lengths")] = 144,
    frontier_answers: Annotated[int, typer.Option(help="answers that judge the plans of the frontier")] = 48,
    steps: Annotated[int, typer.Option(help="training steps of gates, for each half of the texts")] = 20,
    device: Device = None,
    profiles: Annotated[Path, typer.Option(help="folder of the profiles")] = Path("evals/results/profiling"),
    out: Annotated[Path, typer.Option(help="file to append the lines to")] = Path("evals/results/profiling.jsonl"),
    figures: Annotated[Path | None, typer.Option(help="folder to draw to")] = None,
) -> None:
    """Runs the measurements that the options ask for."""
    from evals.benchmarks.profiling import Study, Work
    from evals.benchmarks.profiling_figures import draw

    work = Work(
        tuple(methods), length, long, calibration, long_calibration, confirmation, answers, frontier_answers, steps,
        str(place_of(device)), profiles, out,
    )  # fmt: skip
    for name in models:
        study = Study(name, work)
        if "profile" in stages:
            for method in methods:
                study.profile(method)
        if "seeds" in stages:
            study.seeds()
        if "length" in stages:
            study.lengths()
        if "frontier" in stages:
            study.frontier()
    if figures:
        draw([json.loads(line) for line in out.read_text().splitlines()], figures, profiles)
