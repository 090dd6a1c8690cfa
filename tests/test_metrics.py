from pathlib import Path

import evaluate
import pytest

from evals import metrics

FOLDER = Path(__file__).parents[1] / "evals" / "metrics"


@pytest.mark.parametrize("name", metrics.JUDGES)
def test_loads_as_a_module_of_evaluate(monkeypatch, tmp_path, name):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path))
    loaded = evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=str(tmp_path))
    own = metrics.load(name)
    assert type(loaded).__name__ == type(own).__name__
    assert loaded.description == own.description != ""
    answers = {"predictions": ["4", "the answer is not known"], "references": [["4"], ["7"]]}
    result = loaded.compute(**answers)
    assert result == own.compute(**answers)
    assert result["scores"] == [own.score("4", ["4"]), own.score("the answer is not known", ["7"])]
    assert result["scores"] == [1, 0]
    assert result["score"] == 0.5


def test_unknown_metric():
    with pytest.raises(ValueError, match="'bleu': choose one of exact_match"):
        metrics.load("bleu")


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("The Lake, ", 1), ("lake of glass", 1), ("lakes", 0), ("a lake of glass.", 1), ("lake glass", 0), ("", 0)],
)
def test_exact_match(prediction, score):
    assert metrics.load("exact_match").score(prediction, ["lake", "lake of glass"]) == score
