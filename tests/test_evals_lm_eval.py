"""The model class for lm-evaluation-harness, on one task that lies in a file."""

import json
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from pages import typed
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.methods.redknot import misplaced
from evals.tasks import load
from redknot_hf import HeadPlan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies deprecate things among each other
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from evals.lm_eval_model import RedKnotLM

FOLDER = Path(__file__).parents[1] / "evals" / "tiny"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def task(tmp_path, tokenizer):
    """A task of lm-evaluation-harness: questions about codes, answered in words and by choice between two codes."""
    found = list(load("tiny/code").examples(tokenizer, 300, 6, 0))
    wrong = [example.answers[0] for example in found]
    lines = [
        {
            "prompt": example.context + example.question,
            "answer": example.answers[0],
            "choices": [example.answers[0], *[w for w in wrong if w != example.answers[0]][:1]],
        }
        for example in found
    ]
    (tmp_path / "codes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "codes.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test", "doc_to_text": "{{prompt}}", "target_delimiter": " ",
    }  # fmt: skip
    choose = shared | {
        "task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    say = shared | {
        "task": "say", "output_type": "generate_until", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [" ."], "max_gen_toks": 5}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    return [choose, say]


def scores(model, task):
    found = lm_eval.simple_evaluate(
        model, tasks=task, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, verbosity="ERROR"
    )["results"]
    return found["choose"]["acc,none"], found["say"]["exact_match,none"]


def test_scores_are_those_of_dense_and_fall_with_the_wrong_plan(tokenizer, task):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    options = {"tokenizer": tokenizer, "batch_size": 4}
    plan = HeadPlan.load(FOLDER / "plan.json")
    dense = scores(HFLM(pretrained=model, **options), task)
    assert dense[1] >= 0.75  # single facts are what the bundled model does well
    assert scores(RedKnotLM(model, **options), task) == dense
    ours = RedKnotLM(model, plan=str(FOLDER / "plan.json"), **options)
    assert ours.plan == plan
    assert scores(ours, task) == pytest.approx(dense, abs=0.17)
    assert scores(RedKnotLM(model, plan=misplaced(plan), **options), task)[1] < dense[1] - 0.4


def test_what_the_page_says_prints_a_score(task, tmp_path, monkeypatch, capsys):
    file = tmp_path / "say.yaml"
    file.write_text(json.dumps(task[1]))  # JSON is YAML
    given = f"pretrained={FOLDER},plan={FOLDER / 'plan.json'}"
    words = typed("python -m evals.lm_eval_model", {"pretrained=M,plan=P": given, "T": file})
    monkeypatch.setattr("sys.argv", [*words[2:], "--device", "cpu", "--limit", "2"])
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False)
    )  # thousands of files
    monkeypatch.setattr(
        "lm_eval.utils._LOGGING_CONFIGURED", True
    )  # which would write to this test's terminal for good
    import_module(words[2]).cli_evaluate()
    assert "|say" in capsys.readouterr().out
