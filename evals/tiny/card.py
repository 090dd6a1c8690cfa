"""The tables of the model card, made of what an evaluation measured.

    python -m evals.tiny.card runs/tiny/evaluation.json
    python -m evals.tiny.card runs/tiny/evaluation.json --plan evals/tiny/plan.json

Prints Markdown. `--plan` also writes the accuracies into the provenance of that plan.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from redknot_hf import HeadPlan

# What the bundled model promises on plain questions: dense accuracy by length, and how near the plan comes to it.
LEAST = {"1024": 0.97, "2048": 0.97, "4096": 0.97, "8192": 0.95}
NEAR = 0.005
MAX_BYTES = 16_000_000


def render(evaluation: dict[str, Any]) -> str:
    """Return the card's tables in Markdown."""
    training, lengths = evaluation["training"], evaluation["lengths"]
    modes = list(next(iter(lengths.values()))["plain"])
    lines = [
        f"{training['steps']} steps, {training['tokens'] / 1e6:.0f} M tokens, {training['minutes']:g} minutes on one "
        f"{training['device']}. The file has {evaluation['bytes'] / 1e6:.1f} MB.",
        "",
        "Answer tokens predicted right, each from the true tokens before it:",
        "",
    ]
    rows = [[f"{part}, {mode}", *_cells(lengths, part, mode, "accuracy")]
            for part in ("plain", "dependent") for mode in modes]  # fmt: skip
    rows.append(["answers", *(str(parts["plain"]["dense"]["all"]["answers"]) for parts in lengths.values())])
    lines += _table(["questions", *lengths], rows)
    lines += ["", f"Whole answers right, {' / '.join(modes)}:", ""]
    kinds = [(part, kind) for part in ("plain", "dependent")
             for kind in next(iter(lengths.values()))[part]["dense"] if kind != "all"]  # fmt: skip
    lines += _table(
        ["kind", *lengths],
        [[kind, *(" / ".join(f"{parts[part][mode][kind]['exact']:.3f}" for mode in modes)
                  for parts in lengths.values())] for part, kind in kinds],
    )  # fmt: skip
    return "\n".join(lines)


def missed(evaluation: dict[str, Any]) -> list[str]:
    """Return what the model promises and does not keep, in words; nothing if it keeps all."""
    found = [] if evaluation["bytes"] <= MAX_BYTES else [f"the file has {evaluation['bytes']} bytes, over {MAX_BYTES}"]
    for length, parts in evaluation["lengths"].items():
        marks = {mode: kinds["all"]["accuracy"] for mode, kinds in parts["plain"].items()}
        if marks["dense"] < LEAST.get(length, 0):
            found.append(f"dense accuracy at {length} is {marks['dense']:.4f}, below {LEAST[length]}")
        if abs(marks.get("plan", marks["dense"]) - marks["dense"]) > NEAR:
            found.append(f"at {length} the plan gives {marks['plan']:.4f}, dense {marks['dense']:.4f}")
    return found


def describe_plan(path: Path, evaluation: dict[str, Any]) -> None:
    """Write the measured accuracies into the provenance of a plan's file.

    Raises:
        ValueError: The model was trained plainly, and never evaluated under the plan.
    """
    plan = HeadPlan.load(path)
    parts = {int(length): value["plain"] for length, value in evaluation["lengths"].items()}
    if any("plan" not in modes for modes in parts.values()):
        raise ValueError("the evaluation is of a plainly trained model: it has no figures of a plan")
    figures = {"length": list(parts)}
    for mode in ("dense", "plan"):
        figures[mode] = [modes[mode]["all"]["accuracy"] for modes in parts.values()]
    HeadPlan(plan.heads, provenance={**plan.provenance, "answer_token_accuracy": figures}).save(path)


def _cells(lengths: dict[str, Any], part: str, mode: str, figure: str) -> list[str]:
    return [f"{parts[part][mode]['all'][figure]:.3f}" for parts in lengths.values()]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main(argv: list[str] | None = None) -> None:
    """Prints the tables, and on what the model falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--plan", type=Path, help="plan whose provenance is to hold the accuracies")
    args = parser.parse_args(argv)
    evaluation = json.loads(args.evaluation.read_text())
    print(render(evaluation))
    for line in missed(evaluation):
        print(f"\nNot reached: {line}.")
    if args.plan:
        describe_plan(args.plan, evaluation)


if __name__ == "__main__":
    main()
