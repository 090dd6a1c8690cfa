"""The command line, on few and short examples."""

from dataclasses import replace

import pytest
from pages import typed
from typer.testing import CliRunner

from evals.__main__ import app
from evals.bench import BUNDLED
from evals.methods import METHODS
from evals.methods.redknot import misplaced
from evals.records import Records
from redknot_hf import HeadPlan

SMALL = ["--length", "280", "--count", "6"]


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """The bundled plan, a.json, and one with the wrong heads, b.json, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    plan = HeadPlan.load(BUNDLED / "plan.json")
    plan.save("a.json")
    misplaced(plan).save("b.json")


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_frontier_compares_plans(plans, tmp_path):
    words = typed("python -m evals frontier")[3:]
    done = invoke(*words, *SMALL)
    out = tmp_path / words[-1]
    assert done.exit_code == 0, done.output
    records = Records.load([out / "frontier.jsonl"])
    scores = {
        run.name: sum(a["score"] for (key, _), a in records.answers.items() if key == run.key)
        for run in records.runs.values()
    }
    assert list(scores) == ["dense", "redknot, a", "redknot, b", "streaming"]
    assert scores["redknot, a"] > scores["redknot, b"]
    assert {path.name for path in out.glob("*.png")} == {
        "differences.png", "frontier.png", "times.png", "heads_0.png", "heads_1.png"
    }  # fmt: skip
    assert (out / "report.html").exists()


def test_gate_sets_the_exit_status(plans):
    done = invoke("gate", "--plan", "b.json", "--task", "tiny/code", *SMALL)
    assert done.exit_code == 1
    assert done.stdout.startswith("FAILS: redknot on tiny/code at 280 tokens")


def test_what_the_tokenizer_cannot_write_is_left_out_or_refused_in_a_line(tmp_path):
    out = tmp_path / "x.jsonl"
    alone = invoke("run", "ruler/niah_single_1", "--method", "dense", "--out", out, *SMALL)
    assert alone.exit_code == 1
    assert str(alone.exception).startswith("error: ruler/niah_single_1: the tokenizer of bundled has no words for it")
    both = invoke("run", "ruler/niah_single_1", "tiny/code", "--method", "dense", "--out", out, *SMALL)
    assert both.exit_code == 0, both.output
    assert "left out: ruler/niah_single_1: the tokenizer" in " ".join(both.output.split())
    assert len(Records.load([out]).answers) == 6


def test_a_plan_that_is_not_there_is_a_line(tmp_path):
    done = invoke("run", "tiny/code", "--plan", tmp_path / "nope.json", "--out", tmp_path / "x.jsonl", *SMALL)
    assert str(done.exception) == f"error: [Errno 2] No such file or directory: '{tmp_path / 'nope.json'}'"


def test_a_method_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch):
    out = tmp_path / "x.jsonl"
    command = ("run", "tiny/code", "--method", "dense", "--method", "broken", "--method", "streaming", "--out", out)

    def prepare(model, context):
        raise RuntimeError("many lines\nno keys [a] were found")

    def broken(setting):
        method = replace(METHODS["streaming"](setting), name="broken")
        object.__setattr__(method, "prepare", prepare)
        return method

    monkeypatch.setitem(METHODS, "broken", broken)
    done = invoke(*command, *SMALL)
    assert done.exit_code == 1
    told = " ".join(done.output.split())
    assert "broken failed on tiny/code, 280 tokens: RuntimeError: no keys [a] were found" in told
    records = Records.load([out])
    answered = {records.runs[key].name for key, _ in records.answers}
    assert answered == {"dense", "streaming"}
    monkeypatch.setitem(METHODS, "broken", lambda setting: replace(METHODS["streaming"](setting), name="broken"))
    mended = invoke(*command, *SMALL)
    assert mended.exit_code == 0, mended.output
    assert not Records.load([out]).failures


def test_tasks_are_listed_and_mistakes_told(tmp_path):
    assert "tiny/plain" in invoke("tasks").stdout.splitlines()
    assert invoke("methods").stdout.splitlines() == list(METHODS)
    done = invoke("run", "tiny/plain", "--method", "nothing", "--out", tmp_path / "x.jsonl", *SMALL)
    assert done.exit_code == 1
    assert "no method is called 'nothing'" in str(done.exception) + done.output
