"""The benchmark runs, at a size that says nothing about speed."""

import json
import runpy
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "attention.py"


def test_the_benchmark_ends_in_one_json_line(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    main = runpy.run_path(str(BENCHMARK))["main"]
    main(["--impl", "torch", "--batches", "1", "--lengths", "600", "--repeats", "1", "--out", str(out)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(out.read_text()) == result
    assert {(row["what"], row["plan"]) for row in result["rows"]} == {
        (what, plan) for what in ("decode", "prefill") for plan in ("all global", "1/8 global", "all local")
    }
    assert all(row["s"] > 0 and row["dense"]["math"] > 0 for row in result["rows"])
