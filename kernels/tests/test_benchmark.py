"""The benchmark runs, at a size that says nothing about speed."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from redknot_kernels import implementation

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "attention.py"


def test_the_benchmark_ends_in_one_json_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    main = runpy.run_path(str(BENCHMARK))["main"]
    impl = "triton" if torch.cuda.is_available() else "torch"  # of the two only kernels can be captured
    main(["--impl", impl, "--batches", "1", "--lengths", "600", "--repeats", "1", "--out", str(out)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(out.read_text()) == result
    assert {(row["what"], row["plan"]) for row in result["rows"]} == {
        (what, plan) for what in ("decode", "prefill") for plan in ("all global", "1/8 global", "all local")
    }
    assert all(min(row["s"], *row["dense"].values()) > 0 for row in result["rows"])


def test_a_step_over_cold_pages_reads_what_it_says_it_reads(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    cold = runpy.run_path(str(BENCHMARK.with_name("cold.py")))
    timer = cold["Timer"](torch.device("cpu"), 1)
    kernels, length = implementation("torch"), 512
    of = lambda storage: cold["row"](kernels, timer, "all global", storage, 1, length)  # noqa: E731
    whole, int8, int4 = map(of, ("bf16", "int8", "int4"))
    assert whole["nbytes"] == 2 * 2 * 128 * 8 * length
    assert 0 < int4["nbytes"] < int8["nbytes"] < whole["nbytes"]
    run, _ = cold["step_of"](kernels, timer, "1/8 global", "int8", 2, length)
    run()
    run()  # and takes the same places again
