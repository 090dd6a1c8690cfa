import json

from pages import typed

from evals.benchmarks.commands import reuse_gpu


def test_all_ways_to_the_first_token_are_timed(tmp_path):
    out = tmp_path / "reuse.jsonl"
    size = ["--shape", "toy", "--segments", "2", "--tokens", "300", "--suffix", "8"]
    size += ["--boundary", "0", "--boundary", "0.1"]
    size += ["--repeats", "1", "--device", "cpu", "--folder", str(tmp_path)]
    reuse_gpu.app([*typed("python -m evals bench reuse_gpu", {"X": out})[5:], *size], standalone_mode=False)
    records = {r["method"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert len(records) == 3 + 3 * 3
    for name, record in records.items():
        assert record["first_token_s"] > 0
        assert record["host_ms"]["suffix"] > 0
        assert (record["host_ms"]["splice"] > 0) == name.startswith("reuse")
        if "question" in name:
            assert 0.05 < record["recomputed"] <= 0.15
    assert [path.name for path in tmp_path.iterdir()] == ["reuse.jsonl"]
