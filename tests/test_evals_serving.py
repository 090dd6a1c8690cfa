import json

import pytest
import torch

from evals.benchmarks.commands import serving
from evals.benchmarks.served import peer
from evals.benchmarks.served.roofline import Roofline
from evals.benchmarks.served.scene import PLAN, Scene
from evals.benchmarks.served.work import Work

TOY = ["--shape", "toy", "--device", "cpu"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What all parts write but the one that runs transformers' own, which takes most of the machine's memory."""
    out = tmp_path_factory.mktemp("serving") / "serving.jsonl"
    chosen = [word for name in serving.PARTS if name != "peer" for word in ("--part", name)]
    serving.app([*TOY, *chosen, "--out", str(out)], standalone_mode=False)
    return [json.loads(line) for line in out.read_text().splitlines()]


def of(rows, part):
    return [row for row in rows if row["part"] == part]


def test_every_part_writes_rows_with_bars(rows):
    assert [*dict.fromkeys(row["part"] for row in rows)] == [name for name in serving.PARTS if name != "peer"]
    bars = [bar for row in rows for bar in row.get("bars", {}).values()]
    assert len(bars) == 12
    for bar in bars:
        assert bar["met"] == (bar["found"] >= bar["at_least"] if "at_least" in bar else bar["found"] <= bar["at_most"])


def test_all_decode_and_none_reads_more_than_its_own_token(rows):
    work = serving.WORKS["toy"]["decoding"]
    *engines, static = of(rows, "decoding")
    assert [row["method"] for row in engines] == [
        f"engine, {PLAN}",
        f"engine, {PLAN}, compiled",
        f"engine, {PLAN} in int8",
    ]
    assert all(row["tokens_read_by_requests"] == work.requests for row in engines)
    assert all(row["tokens_per_s"] > 0 for row in (*engines, static))


def test_arrivals_are_read_beside_those_that_decode(rows):
    fits, found = of(rows, "arrivals")
    held = fits["held"]
    assert held[PLAN]["sequences"] == 2
    assert held["all global"]["sequences"] == held["all global"]["by_bytes"] == 1
    assert found["arrived"] >= 2
    parts = found["steps_that_decode_alone"], found["steps_that_read_too"]
    assert sum(part["steps"] for part in parts) == found["full"]["steps"] == found["new"]
    assert found["steps_that_read_too"]["steps"] > 0


def test_a_prefix_lies_in_memory_once(rows):
    (row,) = of(rows, "prefix")
    assert row["pages"] == row["pages_of_one"] == 2 * row["prefix"] // 64
    assert row["cached"] == row["prefix"]
    assert row["bytes_of_requests"] < row["bytes_if_nothing_were_shared"]


def test_a_swapped_sequence_goes_on_with_its_tokens(rows):
    (row,) = of(rows, "swap")
    assert row["unchanged"]
    assert row["swaps"] == len(row["out_ms"]) == len(row["back_ms"]) > 0
    assert row["bytes"] > 0


def test_engines_row_beside_transformers():
    work = Work(2, 20, 3, "8MiB")
    scene = Scene("toy", 64, torch.device("cpu"))
    row = peer.engine_row(scene, work, scene.prompts(2, 20))
    assert row["tokens_per_s"] == pytest.approx(6 / row["s"])


def test_least_time_of_a_step():
    roof = Roofline(100.0, 1000.0, 50, 7, 3, 2, 5, (None, 4))
    assert roof.kept(10) == 14
    assert roof.seen(2, 7) == sum(range(3, 8)) + sum(min(n, 4) for n in range(3, 8))
    assert roof.seen(0, 3) == 2 * sum(range(1, 4))
    assert roof.step([9, 2], []) == (50 + 2 * (14 + 6)) / 100
    assert roof.step([], [(2, 7)]) == (5 * 7 + 3 + 5 * roof.seen(2, 7)) / 1000


@pytest.mark.parametrize("words", [["--part", "none"], ["--shape", "135m"]], ids=["part", "shape"])
def test_what_is_not_known_is_named(words):
    with pytest.raises(Exception, match="give one of"):
        serving.app([*TOY, *words], standalone_mode=False)
