"""How well profiles find the heads that matter: recovery of known classes, frontier over budgets, length, stability.

    python -m evals.profiling --figures evals/results/profiling

The bundled model's true head classes are known, since it was trained with them: it is profiled on texts of one length,
and drift on more sets of them. Its plainly trained twin is the hard case: it is profiled on texts of both lengths.
Plans are judged on texts of their own, through a RedKnotCache, by the answer tokens that are predicted right and by
the KL divergence from the dense model. Every measurement is a JSON line of `--out`; those that are there already are
not made again, so a run that stops goes on. `--figures FOLDER` draws the lines.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from transformers import AutoModelForCausalLM

from evals.result_file import write_line
from evals.tiny.corpus import Exam
from evals.tiny.examination import Part, set_exams
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache
from redknot_hf.profiling import HeadProfile, Prompt, profile_heads

TINY = Path(os.path.relpath(Path(__file__).parent / "tiny"))  # so profiles name no folder of this machine
MODELS = {"bundled": TINY, "plain": TINY / "plain"}
STAGES = ("profile", "seeds", "length", "frontier")
METHODS = ("drift", "loss", "mass", "gates")
RATIOS = (0.05, 0.1, 0.2, 0.3125, 0.4, 0.5, 0.75, 1.0)
RANDOM = ("random 0", "random 1", "random 2")
LOCAL = {"bundled": HeadSpec(window=128, sink=4), "plain": HeadSpec(window=512, sink=4)}
# Seeds of `set_exams`: what is profiled, what confirms a profile, and what judges a plan.
CALIBRATION, CONFIRMATION, JUDGEMENT = 11, 12, 13
SEEDS = range(101, 113)  # of the texts on which drift is profiled once more


class Judge:
    """Held-out texts of one length, and what the dense model says of them."""

    def __init__(self, model: Any, length: int, answers: int) -> None:
        self.model = model
        self.exams = exams(length, answers, JUDGEMENT)
        self.dense = [self.predict(HeadPlan.uniform(model.config, HeadSpec()), exam) for exam in self.exams]

    def __call__(self, plan: HeadPlan) -> dict[str, float | int]:
        """Share of answer tokens that are right under a plan, the dense model's share, and the mean divergence."""
        right, dense_right, kl = [], [], []
        for exam, dense in zip(self.exams, self.dense, strict=True):
            mine, expected = self.predict(plan, exam), torch.from_numpy(exam.ids)[places(exam)]
            right.append(mine.argmax(-1) == expected)
            dense_right.append(dense.argmax(-1) == expected)
            kl.append((dense.exp() * (dense - mine)).sum(-1))
        scores = [float(torch.cat(found).float().mean()) for found in (right, dense_right, kl)]
        names = ("accuracy", "dense_accuracy", "kl")
        return {name: round(score, 5) for name, score in zip(names, scores, strict=True)} | {
            "tokens": sum(map(len, right)),
            "texts": len(self.exams),
        }

    @torch.inference_mode()
    def predict(self, plan: HeadPlan, exam: Exam) -> torch.Tensor:
        """Log-probabilities at the answer tokens."""
        ids = torch.from_numpy(exam.ids)[None].to(self.model.device)
        rows = (places(exam) - 1).to(self.model.device)
        cache = RedKnotCache(self.model.config, plan)
        return self.model(ids, past_key_values=cache, logits_to_keep=rows).logits[0].float().log_softmax(-1).cpu()


def places(exam: Exam) -> torch.Tensor:
    """Places of the answer tokens."""
    return torch.cat([torch.arange(start, stop) for _, start, stop in exam.answers])


def exams(length: int, answers: int, seed: int) -> list[Exam]:
    """Texts with questions, half of them about facts that run through several documents."""
    parts: tuple[Part, ...] = ("plain", "dependent")
    return [exam for part in parts for exam in set_exams(length, part, -(-answers // 2), seed)]


def prompts(length: int, answers: int, seed: int) -> list[Prompt]:
    """Texts to profile on, whose answers are scored."""
    found = []
    for exam in exams(length, answers, seed):
        scored = torch.zeros(len(exam.ids), dtype=torch.bool)
        scored[places(exam)] = True
        found.append(Prompt(torch.from_numpy(exam.ids), scored, "answers"))
    return found


class Run:
    """Everything about one model, line by line."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            MODELS[name], dtype=torch.float32, attn_implementation="redknot"
        ).to(args.device)
        self.ratio, self.local = 10 / 32 if name == "bundled" else 0.5, LOCAL[name]
        lines = args.out.read_text().splitlines() if args.out.exists() else []
        self.done = {key(row) for row in map(json.loads, lines)}

    def write(self, stage: str, what: str, row: dict[str, Any]) -> None:
        """Appends a line."""
        row = {"benchmark": "profiling", "model": self.name, "stage": stage, "what": what, **row}
        write_line(self.args.out, row, torch.device(self.args.device))

    def calibration(self) -> list[Prompt]:
        """Texts to profile on: for the twin, long ones among them."""
        long = [] if self.name == "bundled" else prompts(self.args.long, self.args.long_calibration, CALIBRATION)
        return [*prompts(self.args.length, self.args.calibration, CALIBRATION), *long]

    def profile(self, method: str) -> HeadProfile:
        """The profile by one method, from its file if it is there."""
        path = self.args.profiles / f"{self.name}_{method}.json"
        if path.exists():
            return HeadProfile.load(path)
        inputs = self.calibration()
        lengths, answers = (self.args.length, self.args.long), self.args.confirmation
        confirming = [prompt for n in lengths for prompt in prompts(n, answers, CONFIRMATION)]
        start = time.perf_counter()
        found = profile_heads(
            self.model, inputs, method=method, windows=(self.local.window or 0,), sink=self.local.sink,
            global_ratio=self.ratio, held_out=confirming, steps=self.args.steps,
        )  # fmt: skip
        seconds = round(time.perf_counter() - start, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
        row = {"seconds": seconds, "ratio": self.ratio, "lengths": sorted(map(len, inputs))}
        row["held_out"] = found.provenance["held_out"]
        row["overlap"] = {str(ratio): round(found.overlap(global_ratio=ratio), 3) for ratio in (0.25, self.ratio, 0.5)}
        if self.name == "bundled":
            row |= recovery(found)
        self.write("profile", method, row)
        return found

    def seeds(self) -> None:
        """How often drift finds the true heads, on other sets of texts."""
        for seed in SEEDS if self.name == "bundled" and "drift" in self.args.methods else ():
            if key({"model": self.name, "stage": "seeds", "what": "drift", "seed": seed}) not in self.done:
                texts = prompts(self.args.length, self.args.calibration, seed)
                windows = (self.local.window or 0,)
                # A profile without a budget confirms nothing.
                found = profile_heads(self.model, texts, windows=windows, sink=self.local.sink, held_out=texts[:1])
                self.write("seeds", "drift", {"seed": seed, **recovery(found)})

    def plans(self, ratio: float) -> Iterator[tuple[str, HeadPlan]]:
        """A plan by each method, and random ones, with this share of global heads."""
        for method in self.args.methods:
            yield method, self.profile(method).plan(global_ratio=ratio)
        shape = (self.model.config.num_hidden_layers, self.model.config.num_key_value_heads)
        for name in RANDOM:
            chosen = np.random.default_rng(int(name.split()[1])).permutation(shape[0] * shape[1])
            heads = [divmod(int(head), shape[1]) for head in chosen[: round(ratio * len(chosen))]]
            yield name, HeadPlan.with_global(self.model.config, heads, self.local)

    def lengths(self) -> None:
        """Plans made at one length, judged there and at a longer one."""
        for length in (self.args.length, self.args.long):
            judge = None
            for method, plan in self.plans(self.ratio):
                row = {"model": self.name, "stage": "length", "what": method, "length": length}
                if method not in RANDOM and key(row) not in self.done:
                    judge = judge or Judge(self.model, length, self.args.answers)
                    row = {"length": length, "ratio": self.ratio, "kept": kept(plan, length), **judge(plan)}
                    self.write("length", method, row)

    def frontier(self) -> None:
        """Plans for all shares of global heads."""
        judge = None
        for ratio in track(RATIOS, f"frontier of {self.name}"):
            for method, plan in self.plans(ratio):
                row = {"model": self.name, "stage": "frontier", "what": method, "ratio": ratio}
                if key(row) not in self.done:
                    judge = judge or Judge(self.model, self.args.length, self.args.frontier_answers)
                    self.write(
                        "frontier", method, {"ratio": ratio, "kept": kept(plan, self.args.length), **judge(plan)}
                    )


def kept(plan: HeadPlan, length: int) -> float:
    """Share of the dense cache's bytes that a plan keeps of a text of this length."""
    return round(plan.nbytes(length, 32, 2) / plan.nbytes(1, 32, 2) / length, 4)


def recovery(profile: HeadProfile) -> dict[str, float]:
    """How well a profile finds the heads that are global in truth, at their true number and over all thresholds."""
    true = HeadPlan.load(TINY / "plan.json")
    plan = profile.plan(global_ratio=true.num_global / true.num_heads)
    pairs = [(x.is_global, y.is_global) for p, q in zip(plan, true, strict=True) for x, y in zip(p, q, strict=True)]
    hits = sum(x and y for x, y in pairs)
    errors, right = profile.errors[:, -1], np.array([y for _, y in pairs])
    ranked = errors[right][:, None] > errors[~right]
    return {
        "precision": hits / sum(x for x, _ in pairs),
        "recall": hits / sum(y for _, y in pairs),
        "auc": round(float(ranked.mean()), 4),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a line measures."""
    return (
        row["model"],
        row["stage"],
        row["what"],
        row.get("length"),
        row.get("seed"),
        row.get("ratio") if row["stage"] == "frontier" else None,
    )


def draw(rows: Sequence[dict[str, Any]], folder: Path, profiles: Path) -> None:
    """Draws the frontier of each model, and the heat map of its profile by loss."""
    from matplotlib.figure import Figure

    from redknot_hf.profiling.figure import heat_map

    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        path = profiles / f"{name}_loss.json"
        if path.exists():
            profile = HeadProfile.load(path)
            heat_map(profile, profile.plan()).savefig(folder / f"profile_{name}.png", dpi=100)
    names = [name for name in MODELS if any(r["model"] == name and r["stage"] == "frontier" for r in rows)]
    if not names:
        return
    figure = Figure((5 * len(names), 4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
    for panel, name in zip(panels, names, strict=True):
        found = [row for row in rows if row["model"] == name and row["stage"] == "frontier"]
        for method in [m for m in METHODS if any(row["what"] == m for row in found)]:
            points = sorted((row["ratio"], row["accuracy"]) for row in found if row["what"] == method)
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method)
        ratios = sorted({row["ratio"] for row in found})
        chance = [np.mean([r["accuracy"] for r in found if r["what"] in RANDOM and r["ratio"] == x]) for x in ratios]
        panel.plot(ratios, chance, color="gray", linestyle=":", label="random (mean of 3)")
        panel.axhline(found[0]["dense_accuracy"], color="black", linewidth=0.8, label="dense")
        title = f"{name}, window {LOCAL[name].window}, {found[0]['tokens']} answer tokens" + worse(found)
        panel.set(title=title, xlabel="share of global KV heads")
    panels[0].set_ylabel("answer tokens right")
    panels[0].legend()
    figure.savefig(folder / "profiling_frontier.png", dpi=100)


def worse(found: Sequence[dict[str, Any]]) -> str:
    """Says where a method is worse than the mean of the random plans."""
    told = []
    for method in METHODS:
        below = [
            row["ratio"]
            for row in found
            if row["what"] == method
            and row["accuracy"]
            < np.mean([r["accuracy"] for r in found if r["what"] in RANDOM and r["ratio"] == row["ratio"]])
        ]
        if below:
            told.append(f"{method} is below random at {', '.join(f'{ratio:.0%}' for ratio in sorted(below))}")
    return "\n" + "\n".join(told) if told else ""


def main(argv: list[str] | None = None) -> None:
    """Runs the measurements that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--length", type=int, default=2048, help="tokens of the texts to profile and to judge on")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the longer texts")
    parser.add_argument("--calibration", type=int, default=96, help="answers to profile on")
    parser.add_argument("--long-calibration", type=int, default=288, help="answers in longer texts for the twin")
    parser.add_argument("--confirmation", type=int, default=2, help="answers that confirm a profile at both lengths")
    parser.add_argument("--answers", type=int, default=144, help="answers that judge the plans at both lengths")
    parser.add_argument(
        "--frontier-answers", type=int, default=48, help="answers that judge the plans of the frontier"
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps of gates, for each half of the texts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--profiles", type=Path, default=Path("evals/results/profiling"), help="folder of the profiles"
    )
    parser.add_argument("--out", type=Path, default=Path("evals/results/profiling.jsonl"))
    parser.add_argument("--figures", type=Path, help="folder to draw to")
    args = parser.parse_args(argv)
    for name in args.models:
        run = Run(name, args)
        if "profile" in args.stages:
            for method in args.methods:
                run.profile(method)
        if "seeds" in args.stages:
            run.seeds()
        if "length" in args.stages:
            run.lengths()
        if "frontier" in args.stages:
            run.frontier()
    if args.figures:
        draw([json.loads(line) for line in args.out.read_text().splitlines()], args.figures, args.profiles)


if __name__ == "__main__":
    main()
