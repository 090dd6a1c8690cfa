"""`redknot serve` as a process of its own: what a new user types, and what it refuses before it loads anything."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from listening import client_of, generated
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from redknot_cli import app
from redknot_cli.serve import check_parts
from redknot_hf import HeadPlan
from redknot_hf.serving import Engine

TINY = Path(__file__).parents[1] / "evals" / "tiny"
PROMPT = (
    "<bos> <doc> the code of the wooden school is 3 0 5 3 . </doc> question : what is the code of the wooden school ? "
    "answer :"
)
SMALL = ("--memory", "64MiB", "--max-len", "512", "--dtype", "float32")


def run(*arguments):
    arguments = ("serve", TINY, "--plan", TINY / "plan.json", *arguments)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_bundled_model_answers_and_ends_when_it_is_told():
    command = [sys.executable, "-c", "from redknot_cli import app; app()", "serve", TINY, "--plan", TINY / "plan.json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [*map(str, command), "--port", "0", *SMALL], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, process.stderr.read()
        client = client_of(found.group())
        asked = {"model": str(TINY), "prompt": PROMPT, "max_tokens": 12}
        chunks = client.completions.create(**asked, stream=True)
        text = "".join(chunk.choices[0].text for chunk in chunks)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        _, err = process.communicate()
    assert "Traceback" not in err
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32", attn_implementation="redknot")
    engine = Engine(model, HeadPlan.load(TINY / "plan.json"), memory=1 << 26, max_len=512, tokenizer=tokenizer)
    assert text == generated(engine, tokenizer(PROMPT)["input_ids"], 12)
    assert text.startswith("3 0 5 3 ."), "the right answer"


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
