"""The command line, on few and short examples."""

from importlib import import_module

import pytest
from typer.testing import CliRunner

from evals.__main__ import BENCHMARKS, app
from evals.bench import BUNDLED
from evals.methods.redknot import misplaced
from evals.records import Records
from redknot_hf import HeadPlan

SMALL = ["--length", "280", "--count", "6"]


@pytest.fixture
def plans(tmp_path):
    """The bundled plan, and one with the wrong heads."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    plan = HeadPlan.load(BUNDLED / "plan.json")
    plan.save(good)
    misplaced(plan).save(bad)
    return good, bad


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_frontier_compares_plans(plans, tmp_path):
    out = tmp_path / "out"
    done = invoke("frontier", "tiny/code", *SMALL, "--plans", plans[0], "--plans", plans[1], "--out", out)
    assert done.exit_code == 0, done.output
    records = Records.load([out / "frontier.jsonl"])
    scores = {
        run.name: sum(a["score"] for (key, _), a in records.answers.items() if key == run.key)
        for run in records.runs.values()
    }
    assert list(scores) == ["dense", "redknot, good", "redknot, bad", "streaming"]
    assert scores["redknot, good"] > scores["redknot, bad"]
    assert {path.name for path in out.glob("*.png")} == {
        "differences.png", "frontier.png", "times.png", "heads_0.png", "heads_1.png"
    }  # fmt: skip
    assert (out / "report.html").exists()


def test_gate_sets_the_exit_status(plans):
    done = invoke("gate", "--plan", plans[1], "--task", "tiny/code", *SMALL)
    assert done.exit_code == 1
    assert done.stdout.startswith("FAILS: redknot on tiny/code at 280 tokens")


def test_tasks_are_listed_and_mistakes_told(tmp_path):
    assert "tiny/plain" in invoke("tasks").stdout.splitlines()
    done = invoke("run", "tiny/plain", "--method", "nothing", "--out", tmp_path / "x.jsonl", *SMALL)
    assert done.exit_code == 1
    assert "no method is called 'nothing'" in str(done.exception) + done.output


def test_bench_names_its_programs_and_passes_options_on():
    assert "reuse_gpu" in invoke("bench", "--help").output
    told = invoke("bench", "speed", "--help")
    assert told.exit_code == 0
    assert "decoded tokens a run" in told.output
    assert invoke("bench", "spede").exit_code == 2


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_a_program(name):
    assert callable(import_module(f"evals.benchmarks.{name}").main)
