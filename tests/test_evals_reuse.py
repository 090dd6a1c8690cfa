import json

from pages import typed

from evals.benchmarks.commands import reuse
from evals.benchmarks.reuse_figures import WHOLE

METHODS = ["naive", "deviation 15 %", "prefix cache only", "boundary all"]


def test_the_evaluation_tells_methods_apart(tmp_path, capsys):
    out, figure = tmp_path / "reuse.jsonl", tmp_path / "reuse.png"
    size = ["--contexts", "1", "--dependent", "1", "--documents", "4", "--tokens", "64", "--questions", "6"]
    chosen = [part for method in METHODS for part in ("--method", method)]
    words = typed("python -m evals bench reuse --out", {"X": out, "Y": figure})[5:]
    reuse.app([*words, *size, "--device", "cpu", *chosen], standalone_mode=False)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["method"] for r in records] == ["dense", WHOLE, *METHODS] * 2
    assert figure.stat().st_size > 10_000
    for record in records:
        assert record["questions"] == 6
        assert record["accuracy"][1:] == [None, None]  # one context has no interval
        assert "torch" in record["hardware"]
    dependent = {r["method"]: r for r in records if r["part"] == "dependent facts"}
    assert dependent["boundary all"]["kl"][0] < 1e-5
    assert dependent["prefix cache only"]["kl"][0] < 1e-5 < dependent["naive"]["kl"][0]
    assert dependent["naive"]["recomputed"] == 0
    assert 0.6 < dependent["prefix cache only"]["recomputed"] < dependent["boundary all"]["recomputed"] == 1
    assert "read whole" in capsys.readouterr().out


def test_what_must_be_understood_where_it_is_read_is_lost_naively(tmp_path):
    out = tmp_path / "reuse.jsonl"
    size = ["--contexts", "0", "--dependent", "1", "--documents", "4", "--tokens", "256", "--questions", "15"]
    chosen = ["--method", "naive", "--method", "prefix cache only"]
    reuse.app([*size, "--device", "cpu", *chosen, "--out", str(out)], standalone_mode=False)
    right = {record["method"]: record["accuracy"][0] for record in map(json.loads, out.read_text().splitlines())}
    assert min(right["dense"], right[WHOLE], right["prefix cache only"]) > 0.9
    assert right["naive"] < 0.5
