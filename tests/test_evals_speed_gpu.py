import json

from evals.benchmarks import bars, speed_gpu


def test_rows_and_bars_of_a_toy(tmp_path):
    out = tmp_path / "speed.jsonl"
    methods = ["dynamic", "1/8 global", "1/8 global, captured"]
    size = ["--shape", "toy", "--device", "cpu", "--length", "300", "--tokens", "4"]
    batch = ["--batch", "2", "--batch-length", "128"]
    chosen = [part for method in methods for part in ("--method", method)]
    speed_gpu.app([*size, *batch, *chosen, "--out", str(out)], standalone_mode=False)
    found = json.loads(out.read_text())
    assert {(row["method"], row["batch"]) for row in found["rows"]} == {
        *((method, 1) for method in methods), ("1/8 global, captured", 2), ("dynamic", 2), ("static", 2),
    }  # fmt: skip
    assert all(row["first_s"] > 0 and row["token_s"] > 0 for row in found["rows"])
    assert [one["bar"] for one in found["bars"]] == ["largest dense batch's tokens/s / ours"]


def test_bars_that_reading_bounds_are_scaled():
    row = {"method": "1/8 global, captured", "batch": 1, "length": 32768, "first_s": 1.0}
    slow = bars.bars([{**row, "token_s": 7e-3, "kv_bytes": 1}], bars.READ / 2)
    assert slow == [
        {"bar": "1/8 global, captured, 32768: ms a token", "at_most": 6.0, "scaled": 12.0, "found": 7.0, "met": True}
    ]
