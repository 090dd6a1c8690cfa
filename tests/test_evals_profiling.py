"""The scripts that measure profiles, at a size that takes seconds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import typed

from evals.benchmarks import profiling, profiling_figures
from evals.benchmarks.commands import budgets, profile_cost
from evals.benchmarks.commands import profiling as command
from evals.real import contenders
from redknot_hf import HeadSpec
from redknot_hf.profiling import HeadProfile


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiling")
    arguments = ["--model", "bundled", "--method", "drift", "--length", "320", "--long", "480", "--answers", "3"]
    arguments += ["--calibration", "9", "--frontier-answers", "3", "--device", "cpu"]
    arguments += ["--out", str(folder / "rows.jsonl"), "--profiles", str(folder), "--figures", str(folder / "figures")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "RATIOS", (0.1, 1.0))
        patch.setattr(profiling, "RANDOM", ("random 0",))
        patch.setattr(profiling, "SEEDS", (1, 2))
        command.app(arguments, standalone_mode=False)
        first = (folder / "rows.jsonl").read_text()
        command.app(arguments, standalone_mode=False)  # nothing is left to measure
    assert (folder / "rows.jsonl").read_text() == first
    return folder, [json.loads(line) for line in first.splitlines()]


def test_every_stage_writes_its_lines(measured):
    _, rows = measured
    assert [row["stage"] for row in rows] == ["profile", *["seeds"] * 2, *["length"] * 2, *["frontier"] * 4]
    assert all(0 < row["recall"] <= 1 for row in rows if row["stage"] == "seeds")
    assert all(row["kept"] < 0.6 for row in rows if row["stage"] == "length")
    (profile,) = (row for row in rows if row["stage"] == "profile")
    assert 0 <= profile["recall"] <= 1
    assert [found["length"] for found in profile["held_out"]] == [320, 480]
    assert all("torch" in row["hardware"] for row in rows)


def test_all_global_is_dense_and_less_keeps_less(measured):
    _, rows = measured
    frontier = [row for row in rows if row["stage"] == "frontier"]
    for row in frontier:
        if row["ratio"] == 1:
            assert row["accuracy"] == row["dense_accuracy"]
            assert row["kl"] < 1e-5
            assert row["kept"] == 1
        else:
            assert row["kl"] > 1e-5
            assert row["kept"] < 0.6


def test_the_twin_is_profiled_on_long_texts_too(tmp_path):
    work = profiling.Work((), 320, 480, 3, 6, 2, 3, 3, 1, "cpu", tmp_path, tmp_path / "none")
    lengths = {
        name: [len(text) for text in profiling.Study(name, work).calibration()] for name in ("bundled", "plain")
    }
    assert set(lengths["bundled"]) == {320}
    assert set(lengths["plain"]) == {320, 480}
    assert lengths["plain"].count(480) == 2


def test_figures_are_drawn(measured):
    folder, _ = measured
    assert (folder / "figures" / "profiling_frontier.png").read_bytes().startswith(b"\x89PNG")
    assert HeadProfile.load(folder / "bundled_drift.json").plan().num_global == 10


def test_a_method_below_random_is_told():
    row = {"ratio": 0.5, "accuracy": 0.4}
    rows = [
        {**row, "what": "mass"},
        {**row, "what": "random 0", "accuracy": 0.5},
        {**row, "what": "drift", "accuracy": 0.6},
    ]
    assert profiling_figures.worse(rows) == "\nmass is below random at 50%"
    assert profiling_figures.worse(rows[1:]) == ""


def test_cost_of_a_toy(tmp_path):
    arguments = [
        "--shape",
        "toy",
        "--length",
        "96",
        "--window",
        "8",
        "--window",
        "16",
        "--prompts",
        "4",
        "--scored",
        "8",
    ]
    arguments += [part for name in ("drift", "mass", "loss", "gates") for part in ("--method", name)]
    out = tmp_path / "cost.jsonl"
    profile_cost.app([*arguments, "--loss-seconds", "0.5", "--out", str(out)], standalone_mode=False)
    rows = [json.loads(line) for line in (tmp_path / "cost.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["drift", "mass", "loss", "gates"]
    assert all(row["seconds"] > 0 and row["heads"] == 16 and row["length"] == 96 for row in rows)
    assert all((row["peak_bytes"] > 0) == torch.cuda.is_available() for row in rows)
    profile_cost.app(
        [*arguments[:-8], "--method", "drift", "--storage", "int8", "--out", str(out)], standalone_mode=False
    )
    assert json.loads(out.read_text().splitlines()[-1])["storages"] == ["int8"]


def test_budgets_of_bytes_are_judged_as_a_cache_would_give_them(tmp_path, monkeypatch):
    """Fewer bits are not free: texts are read in chunks."""
    blank = HeadProfile.load(Path(__file__).parents[1] / "evals/results/profiling/bundled_drift.json")
    errors = np.repeat(blank.errors, 3, 1) / (1, 2, 4)
    choices = (HeadSpec(64, 4), HeadSpec(storage="int4"), HeadSpec(storage="int8"))
    made = replace(blank, choices=choices, errors=errors, halves=(errors, errors), length=448, target={})
    monkeypatch.setattr("redknot_hf.profiling.profile_heads", lambda model, texts, **options: made)
    monkeypatch.setattr(contenders, "BUDGETS", (0.7,))
    monkeypatch.setattr(contenders, "_COMPARED", ())
    out = tmp_path / "budgets.jsonl"
    size = ["--model", "bundled", "--length", "448", "--calibration", "2", "--answers", "2"]
    budgets.app([*typed("python -m evals bench budgets", {"X": out})[5:], *size], standalone_mode=False)
    rows = {row["method"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows.keys() == {"drift", "fisher", "int4 everywhere", "int8 everywhere"}
    assert rows["drift"] | {"method": "fisher"} == rows["fisher"]
    assert rows["drift"]["kept"] <= 0.7
    assert rows["int4 everywhere"]["kl"] > max(rows["int8 everywhere"]["kl"], 0)
