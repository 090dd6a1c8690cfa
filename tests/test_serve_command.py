"""`redknot serve` as a process of its own: what a new user types, and what it refuses before it loads anything."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest
from listening import generated
from pages import typed
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from redknot_cli import app
from redknot_cli.serve import check_parts
from redknot_hf import HeadPlan
from redknot_hf.serving import Engine

TINY = Path(__file__).parents[1] / "evals" / "tiny"
ROOT = TINY.parents[1]
# What README tells a new user: how to start it, and what to ask.
_, *START, BEHIND = typed("redknot serve evals/tiny")
CURL, _, ADDRESS, _, HEADER, _, ASK = typed("curl -N localhost:8000/v1/")


def run(*arguments):
    arguments = ("serve", TINY, "--plan", TINY / "plan.json", *arguments)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_what_readme_says_starts_it_and_it_ends_when_it_is_told():
    command = [sys.executable, "-c", "from redknot_cli import app; app()", *START, "--port", "0", "--store", "memory"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [*command, "--dtype", "float32", "--compiled"], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert (CURL, BEHIND) == ("curl", "&")
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, process.stderr.read()
        assert "32 requests at once" in process.stdout.readline()
        address = ADDRESS.replace("localhost:8000", found.group())
        header = dict([HEADER.split(": ")])
        with httpx.stream("POST", address, content=ASK, headers=header, timeout=20) as answer:
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        kept = httpx.post(f"{found.group()}/v1/segments", json={"input": "the code of the wooden school"}, timeout=20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        _, err = process.communicate()
    assert "Traceback" not in err
    assert kept.json()["data"][0]["tokens"] == 6
    assert events.pop() == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert text.startswith("3 0 5 3 ."), "the right answer"
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32", attn_implementation="redknot")
    engine = Engine(model, HeadPlan.load(TINY / "plan.json"), memory=1 << 26, max_len=512, tokenizer=tokenizer)
    assert text == generated(engine, tokenizer(json.loads(ASK)["prompt"])["input_ids"], 16)


def test_what_is_off_is_said_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.delenv("REDKNOT_API_KEY", raising=False)
    (tmp_path / "plan.json").write_text("{")
    for arguments, word in (
        (("--host", "0.0.0.0"), "--no-auth"),
        (("--api-key", ""), "--api-key"),
        (("--api-key", "x", "--no-auth"), "one of them"),
        (("--host", "203.0.113.7", "--api-key", "x"), "--host 203.0.113.7"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--chat-template", tmp_path / "none"), "none"),
        (("--plan", tmp_path / "plan.json"), "plan.json"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert word in result.output


def test_parts_that_are_missing_or_old_are_named(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "fastapi", None)
        assert "redknot-hf[serve]" in run().output
    monkeypatch.setattr(sys.modules["redknot_cli.serve"], "version", lambda name: "5.17.0")
    with pytest.raises(ImportError, match=r"5\.23"):
        check_parts()
