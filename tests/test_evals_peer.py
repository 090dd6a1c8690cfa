"""kvpress in its own environment; skipped where `make .venv-kvpress/.ready` has not been run."""

import pytest
from rich.progress import Progress

from evals.bench import load_bench
from evals.method import dense
from evals.methods.kvpress import PYTHON, press
from evals.records import RecordFile
from evals.running import Plan, run
from evals.tasks import load

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="make .venv-kvpress/.ready")


def test_presses_answer_in_the_same_format_and_keep_their_share(tmp_path):
    methods = [dense(), press("adakv-snapkv", 1.0), press("adakv-expected-attention", 0.2)]
    found = run_all(methods, tmp_path / "x.jsonl")
    full, whole, part = ([a for (key, _), a in found.answers.items() if key == k] for k in found.runs)
    assert len(full) == len(whole) == len(part) == 6
    assert [a.keys() for a in whole] == [a.keys() for a in full]
    assert [a["answer_ids"] for a in whole] == [a["answer_ids"] for a in full]
    assert max(abs(kl) for a in whole for kl in a["fidelity"]["kl"]) < 1e-6
    assert max(kl for a in part for kl in a["fidelity"]["kl"]) > 0.01
    assert all(a["audited"] for a in part)
    versions = [one.versions for one in found.runs.values()]
    assert versions[1] == versions[2] != versions[0]
    assert versions[1]["kvpress"]


def run_all(methods, path):
    with RecordFile(path) as file, Progress(disable=True) as progress:
        run(load_bench("bundled"), Plan(load("tiny/code"), 280, 6), methods, file, progress)
    return file.records
