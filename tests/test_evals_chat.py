"""Prompts in a chat template are what the tokenizer itself makes of the message."""

import copy
import json

import pytest
from rich.progress import Progress

from evals.bench import load_bench, make_bench
from evals.method import dense
from evals.questions import Reader
from evals.records import RecordFile
from evals.running import Plan, run
from evals.task import Example
from evals.tasks import load
from redknot_hf.text.chat import ChatTemplate

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt }}"
)


@pytest.fixture
def tokenizer(byte_tokenizer):
    other = copy.deepcopy(byte_tokenizer)
    other.chat_template = "<s>" + TURNS
    return other


def test_a_template_is_what_stands_around_the_message(tokenizer):
    assert ChatTemplate.of(tokenizer) == ChatTemplate("<s>[user] ", " [end][assistant]")


@pytest.mark.parametrize("documents", [(), ("Once there was ", "a house."), ("", "Once there was a house.")])
def test_prompts_are_those_of_the_tokenizer(tokenizer, documents):
    example = Example(
        "0", "Once there was a house.", " Whose?", ("mine",), 3, answer_prefix="It is", documents=documents
    )
    chat = ChatTemplate.of(tokenizer)
    (group,) = Reader(tokenizer, (), chat).groups([example], 1)
    message = [{"role": "user", "content": example.context + example.question}]
    wanted = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) + "It is"
    ids = [*group.asked.context.rows[0].tolist(), *group.asked.questions[0].ids.tolist()]
    assert tokenizer.decode(ids) == wanted
    assert ids.count(tokenizer.bos_token_id) == 1
    (plain,) = Reader(tokenizer, ()).groups([example], 1)
    least = len(plain.asked.context.rows[0]) + len(plain.asked.questions[0].ids)
    assert len(ids) <= least + Reader(tokenizer, (), chat).overhead


def test_a_template_that_says_nothing_more_changes_no_answer(tmp_path):
    bench = load_bench("bundled")
    bench.tokenizer.chat_template = (bench.tokenizer.bos_token or "") + "{{ messages[0]['content'] }}"
    chat = make_bench(bench.model, bench.tokenizer, "bundled", chat=True)
    with RecordFile(tmp_path / "x.jsonl") as file, Progress(disable=True) as progress:
        for one, length in ((bench, 280), (chat, 280 + chat.reader.overhead)):
            run(one, Plan(load("tiny/code"), length, 3), [dense()], file, progress)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    runs = [line for line in lines if "method" in line]
    assert [one["model"].get("chat") for one in runs] == [None, True]
    plain, same = (
        [line["answer_ids"] for line in lines if line["run"] == one["run"] and "answer_ids" in line] for one in runs
    )
    assert plain == same
    assert len(plain) == 3
    with pytest.raises(ValueError, match="asks how likely a text is, and nothing of an assistant"):
        run(chat, Plan(load("perplexity", str(tmp_path / "x.jsonl")), 280, 3), [dense()], file, progress)


def test_what_is_no_template_is_told(byte_tokenizer, tokenizer):
    with pytest.raises(ValueError, match="has no chat template: ask without one"):
        ChatTemplate.of(byte_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="does not hold a message as it is written"):
        ChatTemplate.of(tokenizer)
