"""How well profiles find the heads that matter: known classes, frontier over budgets, length, stability."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from transformers import AutoModelForCausalLM

from evals.benchmarks.judge import Judge, prompts
from evals.benchmarks.options import MODELS, TINY
from evals.benchmarks.profiling_figures import LOCAL, RANDOM
from evals.result_file import write_line
from redknot_hf import HeadPlan
from redknot_hf.profiling import HeadProfile, Prompt, profile_heads

RATIOS = (0.05, 0.1, 0.2, 0.3125, 0.4, 0.5, 0.75, 1.0)
# Seeds of `set_exams`: what is profiled, and what confirms a profile.
CALIBRATION, CONFIRMATION = 11, 12
SEEDS = range(101, 113)  # of the texts on which drift is profiled once more


@dataclass(frozen=True)
class Work:
    """What is to be measured, and where it is written; see the options of `main`."""

    methods: tuple[str, ...]
    length: int
    long: int
    calibration: int
    long_calibration: int
    confirmation: int
    answers: int
    frontier_answers: int
    steps: int
    device: str
    profiles: Path
    out: Path


class Study:
    """Everything about one model, line by line."""

    def __init__(self, name: str, work: Work) -> None:
        self.name, self.work = name, work
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            MODELS[name], dtype=torch.float32, attn_implementation="redknot"
        )
        self.model.to(work.device)
        self.ratio, self.local = 10 / 32 if name == "bundled" else 0.5, LOCAL[name]
        lines = work.out.read_text().splitlines() if work.out.exists() else []
        self.done = {key(row) for row in map(json.loads, lines)}

    def write(self, stage: str, what: str, row: dict[str, Any]) -> None:
        """Appends a line."""
        row = {"benchmark": "profiling", "model": self.name, "stage": stage, "what": what, **row}
        write_line(self.work.out, row, torch.device(self.work.device))

    def calibration(self) -> list[Prompt]:
        """Texts to profile on: for the twin, long ones among them."""
        long = [] if self.name == "bundled" else prompts(self.work.long, self.work.long_calibration, CALIBRATION)
        return [*prompts(self.work.length, self.work.calibration, CALIBRATION), *long]

    def profile(self, method: str) -> HeadProfile:
        """The profile by one method, from its file if it is there."""
        path = self.work.profiles / f"{self.name}_{method}.json"
        if path.exists():
            return HeadProfile.load(path)
        inputs = self.calibration()
        lengths, answers = (self.work.length, self.work.long), self.work.confirmation
        confirming = [prompt for n in lengths for prompt in prompts(n, answers, CONFIRMATION)]
        start = time.perf_counter()
        found = profile_heads(
            self.model, inputs, method=method, windows=(self.local.window or 0,), sink=self.local.sink,
            global_ratio=self.ratio, held_out=confirming, steps=self.work.steps,
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
        for seed in SEEDS if self.name == "bundled" and "drift" in self.work.methods else ():
            if key({"model": self.name, "stage": "seeds", "what": "drift", "seed": seed}) not in self.done:
                texts = prompts(self.work.length, self.work.calibration, seed)
                windows = (self.local.window or 0,)
                # A profile without a budget confirms nothing.
                found = profile_heads(self.model, texts, windows=windows, sink=self.local.sink, held_out=texts[:1])
                self.write("seeds", "drift", {"seed": seed, **recovery(found)})

    def plans(self, ratio: float) -> Iterator[tuple[str, HeadPlan]]:
        """A plan by each method, and random ones, with this share of global heads."""
        for method in self.work.methods:
            yield method, self.profile(method).plan(global_ratio=ratio)
        shape = (self.model.config.num_hidden_layers, self.model.config.num_key_value_heads)
        for name in RANDOM:
            chosen = np.random.default_rng(int(name.split()[1])).permutation(shape[0] * shape[1])
            heads = [divmod(int(head), shape[1]) for head in chosen[: round(ratio * len(chosen))]]
            yield name, HeadPlan.with_global(self.model.config, heads, self.local)

    def lengths(self) -> None:
        """Plans made at one length, judged there and at a longer one."""
        for length in (self.work.length, self.work.long):
            judge = None
            for method, plan in self.plans(self.ratio):
                row = {"model": self.name, "stage": "length", "what": method, "length": length}
                if method not in RANDOM and key(row) not in self.done:
                    judge = judge or Judge(self.model, length, self.work.answers)
                    row = {"length": length, "ratio": self.ratio, "kept": kept(plan, length), **judge(plan)}
                    self.write("length", method, row)

    def frontier(self) -> None:
        """Plans for all shares of global heads."""
        judge = None
        for ratio in track(RATIOS, f"frontier of {self.name}"):
            for method, plan in self.plans(ratio):
                row = {"model": self.name, "stage": "frontier", "what": method, "ratio": ratio}
                if key(row) not in self.done:
                    judge = judge or Judge(self.model, self.work.length, self.work.frontier_answers)
                    self.write(
                        "frontier", method, {"ratio": ratio, "kept": kept(plan, self.work.length), **judge(plan)}
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
