"""Benchmarks by name, on machines that have no more than a model needs."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evals.__main__ import BENCHMARKS, app
from evals.intervals import FEWEST, check_intervals

ROOT = Path(__file__).parents[1]
TOY = {
    "speed_gpu": ["--shape", "toy", "--device", "cpu", "--length", "64", "--tokens", "4", "--batch", "0",
                  "--method", "dynamic", "--method", "1/8 global"],
    "reuse": ["--contexts", "1", "--dependent", "0", "--documents", "2", "--tokens", "64", "--questions", "5",
              "--method", "naive", "--device", "cpu"],
}  # fmt: skip


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def bare(*lists, missing=()):
    """Runs command lines in one process that has none of what only the other commands need; gives what it printed."""
    program = """
import json, sys
for name in ("datasets", "evaluate", "scipy", "jinja2", *sys.argv[2:]):
    sys.modules[name] = None
from evals.__main__ import app
for words in json.loads(sys.argv[1]):
    try:
        app(words)
    except SystemExit as end:
        assert not end.code
"""
    command = [sys.executable, "-c", program, json.dumps(lists), *missing]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_bench_names_its_programs_and_passes_options_on():
    assert "reuse_gpu" in invoke("bench", "--help").output
    told = invoke("bench", "speed", "--help")
    assert told.exit_code == 0
    assert "decoded tokens a run" in told.output
    assert invoke("bench", "spede").exit_code == 2


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_a_program(name):
    assert callable(import_module(f"evals.benchmarks.commands.{name}").main)


def test_no_benchmark_needs_a_library_to_say_what_it_is():
    """Each takes a second or more to import, and help has half of one."""
    words = [["bench", "--help"], ["serve", "--help"], *(["bench", name, "--help"] for name in BENCHMARKS)]
    said = bare(*words, missing=("torch", "transformers", "numpy", "redknot_hf", "matplotlib"))
    assert all(f"python -m evals bench {name}" in said for name in BENCHMARKS)
    assert "Requests arrive as a Poisson process" in said


def test_toy_benchmarks_run_where_the_other_commands_cannot(tmp_path):
    bare(*(["bench", name, *options, "--out", str(tmp_path / name)] for name, options in TOY.items()))
    for name in TOY:
        lines = (tmp_path / name).read_text().splitlines()
        assert lines
        assert all("torch" in json.loads(line)["hardware"] for line in lines)


def test_the_other_commands_are_named_beside_bench():
    said = invoke("--help").output
    assert all(name in said for name in ("run", "report", "frontier", "gate", "offline", "tasks", "bench"))


def test_intervals_that_cannot_be_had_are_told_before_anything_is_measured(monkeypatch):
    check_intervals(100)
    monkeypatch.setitem(sys.modules, "scipy", None)
    check_intervals(FEWEST - 1)
    with pytest.raises(ImportError, match="intervals over 5 contexts need scipy: pip install scipy, or take fewer"):
        check_intervals(FEWEST)
    assert isinstance(invoke("bench", "reuse", "--contexts", "5").exception, ImportError)
