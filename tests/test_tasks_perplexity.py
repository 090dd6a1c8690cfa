"""Perplexity of a text, measured through the harness, is that of one plain pass over it."""

import math

import pytest
import torch
from rich.progress import Progress

from evals.bench import load_bench
from evals.method import dense
from evals.methods.redknot import all_global
from evals.records import RecordFile, Records
from evals.running import Plan, run
from evals.task import Example
from evals.tasks import load
from evals.tiny.corpus import Corpus
from evals.tiny.lexicon import Lexicon


@pytest.fixture(scope="module")
def bench():
    return load_bench("bundled")


def measured(bench, task, length: int, count: int, methods, path) -> dict[str, list[dict]]:
    with RecordFile(path) as file, Progress(disable=True) as progress:
        run(bench, Plan(task, length, count), methods, file, progress)
    records = Records.load([path])
    return {
        one.name: [answer for (key, _), answer in records.answers.items() if key == one.key]
        for one in records.runs.values()
    }


def test_perplexity_is_that_of_one_pass(bench, tmp_path):
    lexicon = Lexicon()
    text = lexicon.decode(Corpus(lexicon, 5).sample(900, 4)[0].tolist())
    (tmp_path / "text.txt").write_text(text)
    task = load("perplexity", str(tmp_path / "text.txt"))
    examples = list(task.examples(bench.tokenizer, 300, 3, seed=0))
    found = measured(bench, task, 300, 3, [dense(), all_global(bench.model.config)], tmp_path / "x.jsonl")
    assert set(found) == {"dense", "redknot, all global"}
    for example, *answers in zip(examples, *found.values(), strict=True):
        prompt = bench.tokenizer(example.context + example.question, return_tensors="pt")["input_ids"]
        answer = bench.tokenizer(example.answers[0], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = bench.model(torch.cat([prompt, answer], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, answer[0][:, None]).mean()
        for record in answers:
            assert record["answer_ids"] == answer[0].tolist()
            assert record["score"] == pytest.approx(math.exp(expected), rel=1e-3)
            assert record["fidelity"]["tokens"] == answer.shape[1] == 150
            assert record["audited"]


class Prefixed:
    """Asks for what it puts into the model's mouth."""

    name, metric = "prefixed", "string_match_part"

    def examples(self, tokenizer, length, count, seed):
        yield Example("a", "the old baker lives", " near the", ("near the mill",), 1, answer_prefix=" mill")


def test_words_put_into_the_mouth_are_not_judged(bench, tmp_path):
    (record,) = measured(bench, Prefixed(), 100, 1, [dense()], tmp_path / "x.jsonl")["dense"]
    assert record["score"] == 0
