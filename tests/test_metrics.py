import sys
from pathlib import Path

import evaluate
import pytest

from evals import metrics, tasks

FOLDER = Path(__file__).parents[1] / "evals" / "metrics"
CHOICES = [["Blue", "Red"], ["Blue", "Red"]]
# By metric: a right and a wrong answer, and what is right.
SAMPLES = {
    "choice": ("(B)", "(C)", "B"),
    "classification": ("Blue", "Red", "Blue"),
    "only_label": ("It is red.", "Blue, or red.", "red"),
    "retrieval": ("Paragraph 12", "Paragraph 2", "Paragraph 12"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where `evaluate` keeps its copies of modules, and imports them from."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("evaluate"))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
            patch.delitem(sys.modules, name)
        yield folder


@pytest.mark.parametrize("name", metrics.JUDGES)
def test_loads_as_a_module_of_evaluate(cache, name):
    loaded = evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=cache)
    own = metrics.load(name)
    assert type(loaded).__name__ == type(own).__name__
    assert loaded.description == own.description != ""
    right, wrong, reference = SAMPLES.get(name, ("4", "it is not known", "4"))
    answers = {"predictions": [right, wrong], "references": [[reference], [reference]], "choices": CHOICES}
    result = loaded.compute(**answers)
    assert result == own.compute(**answers)
    assert result["scores"] == [own.score(answer, [reference], CHOICES[0]) for answer in (right, wrong)]
    assert result["scores"] == [1, 0]
    assert result["score"] == 0.5


def test_unknown_metric():
    with pytest.raises(ValueError, match="'bleu': choose one of exact_match"):
        metrics.load("bleu")


def test_every_task_has_its_judge():
    judged = {tasks.load(name).metric for name in tasks.names() if name != "perplexity"}
    assert judged == set(metrics.JUDGES)


# A score of each case, by hand from the definition that the metric names.
@pytest.mark.parametrize(
    ("name", "prediction", "references", "choices", "score"),
    [
        ("exact_match", "The Lake, ", ["lake", "lake of glass"], (), 1),
        ("exact_match", "a lake of  glass.", ["lake", "lake of glass"], (), 1),
        ("exact_match", "lakes", ["lake", "lake of glass"], (), 0),
        ("exact_match", "lake glass", ["lake", "lake of glass"], (), 0),
        ("exact_match", "", ["lake"], (), 0),
        ("squad_f1", "the old lake of glass", ["lake"], (), 2 / 5),
        ("squad_f1", "the old lake of glass", ["lake", "a glass lake"], (), 4 / 6),
        ("squad_f1", "lake lake", ["lake"], (), 2 / 3),
        ("squad_f1", "The", ["a"], (), 1),
        ("squad_f1", "", ["lake"], (), 0),
        ("character_f1", "张三、李四", ["张三"], (), 4 / 6),
        ("character_f1", "李 四。", ["李四"], (), 1),
        ("string_match_all", "It is 12 and 7.", ["12", "7", "99", "A"], (), 3 / 4),
        ("string_match_all", "quiet-Harbor", ["Quiet-harbor"], (), 1),
        ("string_match_part", "It is 12.", ["99", "12"], (), 1),
        ("string_match_part", "It is 11.", ["99", "12"], (), 0),
        ("choice", "The correct answer is (C).", ["C"], (), 1),
        ("choice", "**The correct answer is C**", ["C"], (), 1),
        ("choice", "A is wrong, so the answer is: B", ["B"], (), 1),
        ("choice", "A is wrong, so the answer is: B", ["A"], (), 0),
        ("choice", "D. Because A and B are not", ["D"], (), 1),
        ("choice", "A man did it, I would say (B)", ["A"], (), 1),
        ("choice", "I would say B", ["B"], (), 1),
        ("choice", "My answer is a guess: C", ["C"], (), 1),
        ("choice", "None of them", ["A"], (), 0),
        ("choice", "", ["A"], (), 0),
        ("classification", "City or State\nCity", ["City"], ("City", "State"), 1 / 2),
        ("classification", "Other city", ["Other city"], ("city", "Other city"), 1),
        ("classification", "\n city\nState", ["city"], ("city", "State"), 1),
        ("classification", "neither", ["city"], ("city", "State"), 0),
        ("only_label", "The most recent location of Mary is office. Or garden.", ["office"], ("office", "garden"), 1),
        ("only_label", "office, garden", ["office"], ("office", "garden"), 0),
        ("only_label", "apple and milk", ["milk,apple"], ("apple", "milk", "football"), 1),
        ("only_label", "apple", ["milk,apple"], ("apple", "milk", "football"), 0),
        ("retrieval", "Paragraph 3, not 30", ["Paragraph 3"], (), 1 / 2),
        ("retrieval", "none", ["Paragraph 3"], (), 0),
        ("retrieval", "段落3", ["段落3"], (), 1),
        ("count", "There are 5", ["5"], (), 1),
        ("count", "5 of 15", ["5"], (), 1 / 2),
        ("count", "many", ["5"], (), 0),
        ("first_number", "It is 12.50, or 13", ["12.5"], (), 1),
        ("first_number", "13 or 12.5", ["12.5"], (), 0),
        ("first_number", "71432", ["71432"], (), 1),
        ("last_number", "so f(3) returns: -8.", ["-8"], (), 1),
        ("last_number", "-8 it is", ["-8"], (), 0),
        ("last_number", "", ["-8"], (), 0),
        ("leading_numbers", "[3, 5, 9, 1]", ["3", "5", "8", "1"], (), 1 / 2),
        ("leading_numbers", "3", ["3", "-5"], (), 1 / 2),
        ("code_similarity", "# first\n```python\nx = f(1)\ny = 2", ["x = f(1)"], (), 1),
        ("code_similarity", "abcd", ["abxd"], (), 0.75),
        ("code_similarity", "// only", ["x"], (), 0),
    ],
)
def test_score(name, prediction, references, choices, score):
    assert metrics.load(name).score(prediction, references, choices) == pytest.approx(score, abs=1e-9)


# The expected values are those of the package `rouge` 1.0.1, with which LongBench is judged.
@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("the cat sat on the mat. it was warm.", "a cat was on the mat. the mat was warm.", 0.7999999950222222),
        ("one two three four five six", "six five four three two one", 0.16666666166666683),
        (
            "The report finds that costs rose by 4.5 percent. Savings are possible. The agency agrees",
            "Costs rose. The agency agrees that savings are possible. It finds that 4.5 percent is much",
            0.7096774143600416,
        ),
        ("x y z", "a b c", 0),
        ("", "a b c", 0),
    ],
)
def test_rouge_l(prediction, reference, score):
    assert metrics.load("rouge_l").score(prediction, [reference]) == pytest.approx(score, abs=2e-8)
    assert metrics.load("rouge_l").score(prediction, ["q", reference]) == pytest.approx(score, abs=2e-8)


def test_rouge_l_of_a_long_sentence():
    text = " ".join(str(i) for i in range(1100))
    assert metrics.load("rouge_l").score(text, [text]) == 1


@pytest.mark.parametrize("name", ["classification", "only_label"])
def test_choices_must_be_known(name):
    with pytest.raises(ValueError, match="choices"):
        metrics.load(name).score("Red", ["Red"])
