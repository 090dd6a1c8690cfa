"""Records on disk: what a kill tears is made anew, and nothing else."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.progress import Progress

from evals.bench import load_bench
from evals.method import dense
from evals.methods.redknot import redknot
from evals.records import RecordFile, Records, Run
from evals.running import Plan, run
from evals.tasks import load
from redknot_hf import HeadPlan

ROOT = Path(__file__).parents[1]
RUN = Run("task", 10, 0, {"name": "m"}, {"name": "dense"}, {"torch": "1"}, {"device": "cpu"})


def test_key_is_all_that_decides_answers():
    others = [
        replace(RUN, task="other"), replace(RUN, length=11), replace(RUN, seed=1), replace(RUN, model={"name": "n"}),
        replace(RUN, method={"name": "dense", "plan": "1"}), replace(RUN, versions={"torch": "2"}),
    ]  # fmt: skip
    assert len({RUN.key, *(other.key for other in others)}) == 7
    assert replace(RUN, hardware={"device": "cuda"}).key == RUN.key
    assert Run.from_json(json.loads(json.dumps(RUN.to_json()))) == RUN


def test_torn_line_is_cut_off_and_made_anew(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    with RecordFile(path) as file:
        file.begin(RUN)
        file.add(RUN, [{"id": "a", "score": 1.0}, {"id": "b", "score": 0.0}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert set(Records.load([path]).answers) == {(RUN.key, "a")}
    with RecordFile(path) as file:
        assert file.has(RUN, "a")
        assert not file.has(RUN, "b")
        file.begin(RUN)
        file.add(RUN, [{"id": "b", "score": 0.0}])
    assert path.read_bytes() == whole


def test_damage_elsewhere_is_told(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"run": "1", "id": "a"}\n')
    with pytest.raises(ValueError, match="does not describe"):
        Records.load([path])
    path.write_text("{torn\n" + json.dumps(RUN.to_json()) + "\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        Records.load([path])


def test_killed_run_resumes_without_repeating_or_losing(tmp_path):
    killed, straight = tmp_path / "killed.jsonl", tmp_path / "straight.jsonl"
    command = [
        sys.executable, "-m", "evals", "run", "tiny/code", "--length", "280", "--count", "400", "--out", str(killed),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not killed.exists() or killed.read_bytes().count(b"\n") < 8:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait()
    held = killed.read_bytes()
    killed.write_bytes(held + held.splitlines()[-1][:40])  # torn, wherever the kill came
    before = Records.load([killed]).answers

    bench = load_bench("bundled")
    count = len({id for _, id in before}) + 3
    methods = [dense(), redknot(HeadPlan.load(ROOT / "evals" / "tiny" / "plan.json"))]
    for path in (killed, straight):
        with RecordFile(path) as file, Progress(disable=True) as progress:
            run(bench, Plan(load("tiny/code"), 280, count), methods, file, progress)
    again, whole = Records.load([killed]), Records.load([straight])
    lines = [json.loads(line) for line in killed.read_bytes().splitlines()]
    assert killed.read_bytes().startswith(held[: held.rfind(b"\n") + 1])  # nothing is made twice
    assert len(lines) == len(again.runs) + len(again.answers)
    assert again.answers.keys() == whole.answers.keys()
    assert len(again.answers) == 2 * count
    for at, answer in whole.answers.items():
        same = ("answer_ids", "score", "context")
        assert [again.answers[at][name] for name in same] == [answer[name] for name in same]
        # Another process may sum in another order.
        kl, wanted = (found["fidelity"].pop("kl") for found in (again.answers[at], answer))
        assert kl == pytest.approx(wanted, abs=1e-6)
        assert again.answers[at]["fidelity"] == pytest.approx(answer["fidelity"], abs=1e-6)
