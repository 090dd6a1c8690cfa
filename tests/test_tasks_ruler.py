import json
import re
from collections import Counter

import pytest

from evals import tasks
from evals.tasks.length import prompt_tokens
from evals.tasks.ruler import METRICS, NEEDLES
from evals.tasks.ruler.questions import read_inquiries

NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\.")
# By task: needles hidden, values a key, keys asked for. Zero stands for as many as fit.
HIDDEN = {
    "niah_single_1": (1, 1, 1),
    "niah_single_2": (1, 1, 1),
    "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 1, 1),
    "niah_multikey_2": (0, 1, 1),
    "niah_multikey_3": (0, 1, 1),
    "niah_multivalue": (4, 4, 1),
    "niah_multiquery": (4, 1, 4),
}


def test_thirteen_tasks():
    assert len(METRICS) == 13
    assert set(HIDDEN) == set(NEEDLES)


def examples(tokenizer, task: str, length: int = 1500, count: int = 6):
    return list(tasks.load(f"ruler/{task}").examples(tokenizer, length, count, seed=0))


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_answer(byte_tokenizer, task):
    hidden, values, queries = HIDDEN[task]
    depths = set()
    for example in examples(byte_tokenizer, task):
        needles = NEEDLE.findall(example.context)
        assert len(needles) == hidden or (hidden == 0 and len(needles) > 8)
        held: dict[str, set[str]] = {}
        for key, value in needles:
            held.setdefault(key, set()).add(value)
        assert {len(found) for found in held.values()} == {values}
        asked = [key for key in held if key in example.question]
        assert len(asked) == queries
        assert all(key in example.answer_prefix for key in asked)
        assert set(example.answers) == {value for key in asked for value in held[key]}
        assert len(example.answers) == values * queries
        assert example.answer_prefix.endswith(" is" if len(example.answers) == 1 else " are")
        depths.add(round(example.context.index(f" {asked[0]} ") / len(example.context), 1))
    assert len(depths) > 2


def test_needles_in_a_given_text(byte_tokenizer, tmp_path):
    (tmp_path / "essay.txt").write_text("Only this is told. And then it ends!")
    task = tasks.load("ruler/niah_multikey_1", str(tmp_path / "essay.txt"))
    (example,) = task.examples(byte_tokenizer, 900, 1, seed=0)
    text = NEEDLE.sub("", example.context.split("\n")[1])
    assert set(re.split(r"(?<=[.!])\s+", text.strip())) == {"Only this is told.", "And then it ends!"}
    assert len(NEEDLE.findall(example.context)) == 4


def test_variables_lead_to_the_value(byte_tokenizer):
    for example in examples(byte_tokenizer, "vt"):
        shown, text = example.context.split("\n\nMemorize")
        for told, answers in ((shown, shown.split("they are: ")[1].split()), (text, example.answers)):
            held: dict[str, str] = {}
            for name, value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", told, flags=re.MULTILINE):
                held[name] = held.get(value, value)
            (value,) = set(held.values())
            assert list(held) == list(answers)
            assert len(held) == 5
        assert value in example.question
        assert value not in shown


@pytest.mark.parametrize(("length", "often"), [(1500, 6), (6000, 30)])
def test_common_words_are_the_most_common(byte_tokenizer, length, often):
    for example in examples(byte_tokenizer, "cwe", length, 2):
        shown, text = example.context.split("Below is")[1:]
        counts = Counter(re.findall(r"\d+\. (\w+)", text))
        assert {word for word, n in counts.items() if n == often} == set(example.answers)
        assert len(example.answers) == 10
        assert max(n for word, n in counts.items() if word not in example.answers) * 5 < often
        listed, answers = shown.split("are: ") if "are: " in shown else shown.split("are:")
        best = Counter(re.findall(r"\d+\. (\w+)", listed)).most_common(10)
        assert {word for word, _ in best} == set(re.findall(r"\d+\. (\w+)", answers))
        assert not set(example.answers) & {word for word, _ in best}


@pytest.mark.parametrize("length", [900, 4600])
def test_frequent_words_are_the_most_frequent(byte_tokenizer, length):
    for example in examples(byte_tokenizer, "fwe", length, 2):
        counts = Counter(example.context.split("coded words. ")[1].split())
        best = counts.most_common(5)
        assert [word for word, _ in best[:4]] == ["...", *example.answers]
        assert best[3][1] > best[4][1]


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions_are_answered_by_the_passages(byte_tokenizer, task):
    for example in examples(byte_tokenizer, task, 3000, 12):
        people = {
            name: {"trade": trade, "birth": town}
            for name, trade, town in re.findall(r"(\w+ \w+) was a (\w+) who was born in (\w+)", unarticled(example))
        }
        towns = {
            town: {"year": year, "founder": name}
            for town, year, name in re.findall(
                r"(\w+) is a \w+ town known for its \w+\. It was founded in (\d+) by (\w+ \w+)", unarticled(example)
            )
        }
        assert len(people) + len(towns) == len(example.documents) - 1 > 8
        question = example.question.split("Question: ")[1].rstrip("?")
        (answer,) = example.answers
        words = question.split()
        match words:
            case ["Who", "founded", town]:
                assert answer == towns[town]["founder"]
            case ["In", "which", "year", "was", town, "founded"]:
                assert answer == towns[town]["year"]
            case [*_, "founder", "of", town, "born"]:
                assert answer == people[towns[town]["founder"]]["birth"]
            case [*_, "founder", "of", town]:
                assert answer == people[towns[town]["founder"]]["trade"]
            case [*_, first, last, "born"]:
                assert answer == people[f"{first} {last}"]["birth"]
            case [*_, first, last]:
                assert answer == people[f"{first} {last}"]["trade"]
        assert ("founder of" in question) == (task == "qa_2")


def unarticled(example) -> str:
    return example.context.replace(" an ", " a ")


def row(i: int) -> dict:
    passages = [{"title": f"Lake {i}", "text": f"Lake {i} is {i + 10} feet deep.", "needed": True}]
    passages += [{"title": f"Hill {i}{j}", "text": f"Hill {i}{j} is high and old."} for j in range(3)]
    return {"question": f"How deep is lake {i}?", "answers": [f"{i + 10} feet", str(i + 10)], "passages": passages}


def test_questions_over_supplied_passages(byte_tokenizer, tmp_path):
    path = tmp_path / "lakes.jsonl"
    path.write_text("\n".join(json.dumps(row(i)) for i in range(30)))
    task = tasks.load("ruler/qa_1", str(path))
    asked = list(task.examples(byte_tokenizer, 1000, 20, seed=0))
    assert list(task.examples(byte_tokenizer, 1000, 5, seed=0)) == asked[:5]
    assert len({example.question for example in asked}) == 20
    for example in asked:
        assert 850 <= prompt_tokens(byte_tokenizer, example) <= 1000
        assert len(set(example.documents)) == len(example.documents) > 12
        assert "".join(example.documents) == example.context
        lake = example.question.split()[-1].rstrip("?")
        assert f"Lake {lake} is {example.answers[0]} deep." in example.context
        assert sum(f"Hill {lake}{j}\n" in example.context for j in range(3)) == 3
    everything = next(task.examples(byte_tokenizer, 10**5, 1, seed=0))
    assert len(everything.documents) == 1 + 30 * 4
    with pytest.raises(ValueError, match=r"has 30 questions \(of 30\) that fit 1000 tokens, count is 31"):
        list(task.examples(byte_tokenizer, 1000, 31, seed=0))
    with pytest.raises(ValueError, match=r"has 0 questions \(of 30\) that fit 60 tokens"):
        list(task.examples(byte_tokenizer, 60, 1, seed=0))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"answers": ["x"]}, r"line 2: KeyError\('passages'\)"),
        (
            {"question": "x", "answers": ["x"], "passages": [{"title": "t", "text": "x"}]},
            "line 2: no passage has needed",
        ),
    ],
)
def test_supplied_passages_are_checked(tmp_path, broken, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(f"{json.dumps(row(1))}\n{json.dumps(broken)}\n")
    with pytest.raises(ValueError, match=message):
        read_inquiries(str(path))
