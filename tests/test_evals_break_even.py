"""The benchmark of fetching against reading: its arithmetic, and that the rate is kept."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evals.benchmarks.break_even import Sender, fetched
from evals.benchmarks.commands import break_even as command

ROOT = Path(__file__).parents[1]


def test_fetching_is_held_against_reading(tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ["--shape", "toy", "--length", "600", "--runs", "1", "--device", "cpu", "--out", str(out)]
    rates = [word for rate in (20, 100, 1000) for word in ("--rate", str(rate))]
    done = CliRunner().invoke(command.app, words + rates)
    assert done.exit_code == 0, done.output
    (line,) = out.read_text().splitlines()
    dense, planned = json.loads(line)["rows"]
    assert len(json.loads(line)["hardware"]["load_average"]) == 2
    assert planned["bytes"] < dense["bytes"]
    for row in (dense, planned):
        assert row["break_even_mb_per_s"] == pytest.approx(row["bytes"] / 1e6 / row["read_s"])
        assert [one["mb_per_s"] for one in row["fetched"]] == [20, 100, 1000]
        slowest = row["fetched"][0]
        assert slowest["fetch_s"] >= 0.9 * (row["bytes"] - 2e5) / 20e6
    assert CliRunner().invoke(command.app, [*words, "--rate", "0"]).exit_code == 2


def test_the_page_has_what_was_measured():
    lines = (ROOT / "evals" / "results" / "break_even.jsonl").read_text().splitlines()
    page = (ROOT / "docs" / "scaling.md").read_text()
    for row in (row for line in lines for row in json.loads(line)["rows"]):
        times = [row["read_s"], *(one["fetch_s"] for one in row["fetched"]), row["break_even_mb_per_s"]]
        cells = [row["bytes"] / 1e6, *times]
        assert "".join(f"| {cell:.1f} " for cell in cells) + "|" in page, row["kind"]


def test_a_sender_keeps_its_rate():
    data = bytes(range(256)) * 400
    with Sender(memoryview(data), 1e6) as sender:
        start = time.perf_counter()
        came = fetched(sender.port, len(data))
        assert time.perf_counter() - start >= 0.08
        assert bytes(came.numpy()) == data
        with pytest.raises(ConnectionError, match="bytes came of"):
            fetched(sender.port, len(data) + 1)
