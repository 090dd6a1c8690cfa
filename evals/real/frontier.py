"""Measures a frontier: profiles a model, and asks every plan the same items in one run.

Every item is one pass a plan, answers given (teacher-forced): heads see what a RedKnotCache would give them that reads
the text in chunks, cold pages included. What comes out is a line an item and plan: sums, of which `summary` makes
figures with paired intervals.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.identity import hardware, versions
from evals.real.contenders import Contender, contenders, part
from evals.real.items import Item, items
from evals.real.peers import Peer, peers
from evals.real.texts import docstrings, fingerprint
from evals.result_file import write_line
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import (
    HeadProfile,
    Prompt,
    calibration_kinds,
    calibration_prompts,
    profile_heads,
    python_texts,
)

STORAGES = ("int8", "int4")
_SECONDS = 300  # of a search by loss, fisher included: it ends by itself before
_NAMES = re.compile(r"drift at 2K|mass|(drift|fisher)( [1-9]\d*)?|loss 0?\.\d+|loss 1(\.0)?")
_ROUNDS = 4  # prompts of every kind that are measured, and to confirm on


@dataclass(frozen=True)
class Job:
    """What a frontier is measured on.

    Attributes:
        length: Tokens of an item, and of the prompts that are profiled.
        count: Items.
        first: Number of the first: runs of other numbers add to it.
        profiles: Folder of a run whose profiles are taken; without one they are measured.
        peers: Whether other libraries' ways are asked too.
        swapped: Budgets for which the plans of fisher are searched further, by `loss`.
        seconds: After which no further item is begun.
    """

    model: Any
    tokenizer: Any
    length: int
    count: int
    swapped: tuple[float, ...]
    seconds: float
    out: Path
    first: int = 0
    profiles: Path | None = None
    peers: bool = False


def load(folder: Path, device: str, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """The model, ready to be watched, and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="redknot")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def measure(job: Job, say: Callable[[str], object] = print) -> None:
    """Writes the profiles, the plans' figures at the length, item by item, and what it was run on, into a folder."""
    start = time.perf_counter()
    job.out.mkdir(parents=True, exist_ok=True)
    others = peers() if job.peers else []
    profiles = read_profiles(job.profiles) if job.profiles else make_profiles(job, names(job), say)
    plans: list[Contender | Peer] = [*contenders(job.model.config, job.length, profiles), *others]
    about = {**hardware(job.model.device), **versions(("torch", "transformers"))}
    head = {
        "length": job.length,
        "texts": fingerprint(),
        "seconds": {name: p.provenance["seconds"] for name, p in profiles.items()},
    }
    with (job.out / "items.jsonl").open("w") as lines:
        lines.write(json.dumps({**head, "hardware": about}) + "\n")
        every = items(job.tokenizer, docstrings(), job.length, job.first + job.count)
        for index, item in islice(enumerate(every), job.first, None):
            if time.perf_counter() - start > job.seconds:
                say(f"out of time at item {index}")
                break
            lines.writelines(json.dumps(row) + "\n" for row in asked(job.model, index, item, plans))
            lines.flush()
    say(f"{len(plans)} plans, {time.perf_counter() - start:.0f} s")


def names(job: Job) -> list[str]:
    """The profiles that a frontier compares."""
    short = ["drift at 2K"] if job.length > 2048 else []
    return ["drift", "fisher", "mass", *(f"loss {budget}" for budget in job.swapped), *short]


def make_profiles(job: Job, wanted: list[str], say: Callable[[str], object]) -> dict[str, HeadProfile]:
    """Some profiles by their names, each written to the folder, and what it took to a line of `profiles.jsonl` there.

    The seconds of all threads say more than the clock where other processes share the cores (`load_average`, before
    and after).

    Raises:
        ValueError: A name is none that a frontier knows.
    """
    for name in wanted:
        if not _NAMES.fullmatch(name):
            raise ValueError(
                f"profile {name!r}: name drift, fisher, mass, 'drift at 2K', 'fisher 12' for so many prompts of every "
                f"kind in place of {_ROUNDS}, or 'loss 0.1' for a budget"
            )
    texts = python_texts()
    kinds = calibration_kinds(texts)

    @cache
    def prompts(length: int, seed: int, rounds: int = _ROUNDS) -> list[Prompt]:
        count = rounds * len(kinds)
        return calibration_prompts(job.tokenizer, length=length, count=count, kinds=kinds, texts=texts, seed=seed)

    found: dict[str, HeadProfile] = {}
    for name in wanted:
        method, _, rest = name.partition(" ")
        rounds = int(rest) if rest.isdigit() else _ROUNDS
        inputs, held_out = prompts(2048 if rest == "at 2K" else job.length, 1, rounds), prompts(job.length, 2)
        options: dict[str, Any] = {} if method == "mass" else {"storages": STORAGES}
        if method == "loss":
            options |= {"seconds": _SECONDS}
        budget = float(rest) if method == "loss" else 0.2
        begun, load = time.process_time(), os.getloadavg()[0]
        profile = profile_heads(job.model, inputs, method=method, budget=budget, held_out=held_out, **options)
        found[name] = profile
        profile.save(job.out / f"{name.replace(' ', '_')}.json")
        seconds = profile.provenance["seconds"]
        say(f"{name}: {seconds} s, overlap {profile.provenance.get('overlap')}")
        row = {
            "benchmark": "real_profile", "profile": name, "length": profile.length, "prompts": len(inputs),
            "held_out": len(held_out), "seconds": seconds, "cpu_seconds": round(time.process_time() - begun, 1),
            "load_average": [load, os.getloadavg()[0]],
        }  # fmt: skip
        write_line(job.out / "profiles.jsonl", row, job.model.device)
    return found | (parts(found["drift"]) if "drift" in found else {})


def parts(drift: HeadProfile) -> dict[str, HeadProfile]:
    """A profile of all choices as those of windows and of storages alone."""
    return {
        "windows only": part(drift, windows=True, storages=False),
        "storages only": part(drift, windows=False, storages=True),
    }


def read_profiles(folder: Path) -> dict[str, HeadProfile]:
    """The profiles that an earlier run has written to its folder, by name."""
    found = {path.stem.replace("_", " "): HeadProfile.load(path) for path in sorted(folder.glob("*.json"))}
    return {"drift": found["drift"], **parts(found["drift"]), **found}


def asked(model: Any, index: int, item: Item, plans: Sequence[Contender | Peer]) -> list[dict[str, Any]]:
    """A line for the dense model and for every plan: of every task answers, right ones, and sums over its tokens."""
    dense = predicted(model, Contender("dense", 1.0, 1.0, HeadPlan.uniform(model.config, HeadSpec())), item)
    rows = [{"item": index, "method": "dense", "budget": 1.0, "kept": 1.0, "tasks": scored(item, dense, dense)}]
    for one in plans:
        tasks = scored(item, predicted(model, one, item), dense)
        if not one.tells_text:
            del tasks["text"]
        rows.append(
            {"item": index, "method": one.method, "budget": one.budget, "kept": round(one.kept, 5), "tasks": tasks}
        )
    return rows


@torch.no_grad()
def predicted(model: Any, contender: Contender | Peer, item: Item) -> torch.Tensor:
    """Log-probabilities at the places that are scored, `[places, words]`."""
    rows = torch.tensor(item.places, device=model.device) - 1
    with contender.running(model, item):
        out = model(torch.tensor([item.ids], device=model.device), use_cache=False, logits_to_keep=rows)
    return out.logits[0].float().log_softmax(-1)


def scored(item: Item, mine: torch.Tensor, dense: torch.Tensor) -> dict[str, list[float]]:
    """Of every task: answers, right answers, tokens, and summed over them nll, KL(dense || mine), same likeliest."""
    ids = torch.tensor([item.ids[place] for place in item.places], device=mine.device)
    columns = torch.stack([
        (mine.argmax(-1) == ids).float(),
        -mine.gather(1, ids[:, None])[:, 0],
        (dense.exp() * (dense - mine)).sum(-1),
        (mine.argmax(-1) == dense.argmax(-1)).float(),
    ]).cpu().numpy()  # fmt: skip
    at = {place: i for i, place in enumerate(item.places)}
    found = {}
    for task, answers in item.answers.items():
        right = sum(all(columns[0, at[place]] for place in answer) for answer in answers)
        tokens = [at[place] for answer in answers for place in answer]
        sums = columns[1:, tokens].sum(1)
        found[task] = [len(answers), int(right), len(tokens), *(round(float(total), 5) for total in sums)]
    return found
