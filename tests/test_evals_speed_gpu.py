import json

from evals.benchmarks import bars, speed_gpu
from evals.benchmarks.commands import speed_gpu as command


def test_rows_and_bars_of_a_toy(tmp_path):
    out = tmp_path / "speed.jsonl"
    methods = ["dynamic", "1/8 global", "1/8 global, captured"]
    size = ["--shape", "toy", "--device", "cpu", "--length", "300", "--tokens", "4"]
    batch = ["--batch", "2", "--batch-length", "128"]
    chosen = [part for method in methods for part in ("--method", method)]
    command.app([*size, *batch, *chosen, "--out", str(out)], standalone_mode=False)
    found = json.loads(out.read_text())
    assert {(row["method"], row["batch"]) for row in found["rows"]} == {
        *((method, 1) for method in methods), ("1/8 global, captured", 2), ("dynamic", 2), ("static", 2),
    }  # fmt: skip
    assert all(row["first_s"] > 0 for row in found["rows"] if row["batch"] == 1 or row["method"] != methods[2])
    assert all(row["token_s"] > 0 for row in found["rows"])
    assert [one["bar"] for one in found["bars"]] == ["largest dense batch's tokens/s / ours"]


def test_stored_batches_and_the_most_that_are_held(tmp_path, monkeypatch):
    out = tmp_path / "speed.jsonl"
    monkeypatch.setattr(speed_gpu, "HELD", 6_000_000)
    monkeypatch.setattr(speed_gpu.Contest, "captured", lambda self, cache, ids, new: (0.1 * new, ids))
    size = ["--shape", "toy", "--device", "cpu", "--length", "300", "--batch", "2", "--batch-length", "1024"]
    command.app([*size, "--stored", "--method", "dynamic", "--out", str(out)], standalone_mode=False)
    rows = [row for row in json.loads(out.read_text())["rows"] if row["method"] != "dynamic"]
    held = [row["batch"] for row in rows if "held_in" in row]
    assert len(rows) == 6
    assert 1 <= held[0] < held[1] < held[2], held


def test_bars_that_reading_bounds_are_scaled():
    row = {"method": "1/8 global, captured", "batch": 1, "length": 32768, "first_s": 1.0}
    slow = bars.bars([{**row, "token_s": 7e-3, "kv_bytes": 1}], bars.READ / 2)
    assert slow == [
        {"bar": "1/8 global, captured, 32768: ms a token", "at_most": 6.0, "scaled": 12.0, "found": 7.0, "met": True}
    ]
