"""The benchmark of ranks: what one device does, which several are held against."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evals.benchmarks import ranks
from evals.benchmarks.commands import ranks as command

ROOT = Path(__file__).parents[1]


def test_steps_of_one_device_are_timed_in_which_all_decode(tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ["--shape", "toy", "--device", "cpu", "--requests", "3", "--length", "100", "--new", "8"]
    done = CliRunner().invoke(command.app, [*words, "--memory", "8MiB", "--out", str(out)])
    assert done.exit_code == 0, done.output
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["ranks"], row["steps"], row["captured"], row["compiled"]) == (1, 6, False, False)
    assert row["kernels_ms"].pop("") == pytest.approx(sum(row["kernels_ms"].values()), rel=0.5)
    assert row["tokens_per_s"] == pytest.approx(3e3 / row["step_ms"])
    assert 0 < row["pages_bytes"] <= 8 << 20
    assert "bars" not in row
    two = row | {"ranks": 2, "tokens_per_s": 1.7 * row["tokens_per_s"]}
    (bar,) = ranks.against_one(out, two)["bars"].values()
    assert bar == {"found": pytest.approx(1.7), "at_least": 1.6, "met": True}
    done = CliRunner().invoke(command.app, [*words[:6], "--length", "100", "--new", "1", "--memory", "8MiB"])
    assert "the first request had its 1 tokens before the last one was read" in str(done.exception)
    assert not ranks.against_one(out, two | {"length": 200})
    assert not ranks.against_one(tmp_path / "none", two)


def test_the_page_has_what_was_measured():
    one, two, compiled = map(json.loads, (ROOT / "evals/results/ranks.jsonl").read_text().splitlines())
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert [(row["ranks"], row["compiled"]) for row in (one, two, compiled)] == [(1, False), (2, False), (2, True)]
    for name, row in (("one GPU", one), ("two GPUs", two), ("two GPUs, compiled", compiled)):
        cells = f"{row['pages_bytes'] / 1e9:.1f} GB", f"{row['step_ms']:.1f} ms", f"{row['tokens_per_s']:,.0f}"
        assert f"| {' | '.join((name, *cells))} |" in page
    times = [row["tokens_per_s"] / one["tokens_per_s"] for row in (two, compiled)]
    assert "That is {:.2f} times one GPU, and {:.2f} with steps that are compiled".format(*times) in page
