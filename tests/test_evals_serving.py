import json

from evals.benchmarks import serving


def test_steps_in_which_all_decode_are_timed(tmp_path, capsys):
    out = tmp_path / "serving.jsonl"
    size = ["--shape", "toy", "--device", "cpu", "--requests", "3", "--length", "70", "--new", "9", "--memory", "8MiB"]
    serving.app([*size, "--out", str(out)], standalone_mode=False)
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    (row,) = found["rows"]
    assert (row["requests"], row["length"], row["new"]) == (3, 70, 9)
    assert 0 < row["steps"] < 9
    assert row["tokens_per_s"] > 0
    assert row["step_ms"] < 1e3 * row["s"]
