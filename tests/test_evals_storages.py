import json

from pages import typed

from evals.benchmarks.commands import storages


def test_errors_by_storage_on_gaussian_data_and_the_bundled_model(tmp_path):
    out = tmp_path / "storages.jsonl"
    size = ["--device", "cpu", "--length", "480", "--real", str(tmp_path)]
    storages.app([*typed("python -m evals bench storages", {"X": out})[5:], *size], standalone_mode=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["data"], row["storage"]) for row in rows] == [
        *[("Gaussian", "int8"), ("Gaussian", "int4")] * 2, ("bundled", "int8"), ("bundled", "int4"),
    ]  # fmt: skip
    for fine, coarse in zip(rows[::2], rows[1::2], strict=True):
        assert 0 < 5 * fine["attention"] < coarse["attention"] < 0.3
    fine, coarse = rows[-2:]
    assert 0 <= fine["kl"] < coarse["kl"]
    assert fine["attention"] <= fine["attention_most"]
    assert all(0 < row["agree"] <= 1 for row in (fine, coarse))
    assert all("torch" in row["hardware"] for row in rows)
