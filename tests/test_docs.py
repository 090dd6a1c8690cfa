"""The code blocks of README and docs run, on a small model and in the order in which they stand on their page."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from families import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import redknot_hf
import redknot_hf.profiling
from redknot_hf import HeadPlan, HeadSpec

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# What the pages take as given: figures are cut to what a small model reads in seconds.
SMALLER = {"length=4096": "length=400", "(128, 256, 512, 1024)": "(16, 64)", "33_000": "2_000", "count=8": "count=6"}


def blocks(language):
    return [(page, code) for page in PAGES for kind, code in BLOCK.findall(page.read_text()) if kind == language]


@pytest.fixture
def given(byte_tokenizer, tmp_path, monkeypatch):
    """The names that the pages do not make themselves."""
    model = make_model(
        "llama", vocab_size=len(byte_tokenizer), max_position_embeddings=4096, pad_token_id=None, num_hidden_layers=6
    )
    plan = HeadPlan.with_global(model.config, [(0, 1)], HeadSpec(16, 2))
    monkeypatch.chdir(tmp_path)
    plan.save("plan.json")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: model)
    model.generation_config.max_new_tokens = 3
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (1, 40), generator=draw)
    texts = [torch.randint(3, 500, (50,), generator=draw).tolist() for _ in range(3)]
    names = {"name": "llama", "model": model, "plan": plan, "inputs": {"input_ids": ids}, "tokenizer": byte_tokenizer}
    names |= {"bos": [0], "documents": texts, "texts": texts, "question": texts[0][:7], "prefix": [0]}
    return {**{word: getattr(redknot_hf, word) for word in redknot_hf.__all__}, **names}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_pages_runs(page, given, monkeypatch):
    if page.name == "plans.md":  # a profile says nothing of a model that can do nothing
        tiny = ROOT / "evals" / "tiny"
        given["tokenizer"] = AutoTokenizer.from_pretrained(tiny)
        monkeypatch.undo()
        given["model"] = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="redknot")
    if page.name == "tutorial.md":
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: given["tokenizer"])
    if page.name in ("text.md", "README.md"):
        given["texts"] = ["The house is green.", "Ann lives there, with a cat."]
        given["context"] = " ".join(given["texts"])
    for code in (code for where, code in blocks("python") if where == page):
        for long, short in SMALLER.items():
            code = code.replace(long, short)
        exec(compile(code, str(page), "exec"), given)


def commands():
    """Lines of shell blocks, fenced and indented, that begin with one of our commands, in this order."""
    lines = [line for page, code in blocks("") for line in code.splitlines()]
    told = [*PAGES, ROOT / "evals" / "README.md", ROOT / "CONTRIBUTING.md"]
    lines += [line.strip() for page in told for line in page.read_text().splitlines() if line.startswith("    ")]
    return [line for line in dict.fromkeys(lines) if line.startswith(tuple(PROGRAMS))]


PROGRAMS = {
    "redknot ": "redknot_cli",
    "python -m evals ": "evals.__main__",
    "python -m evals.real ": "evals.real.__main__",
}


@pytest.mark.parametrize("line", commands())
def test_options_of_the_pages_are_there(line):
    name = next(name for name in PROGRAMS if line.startswith(name))
    words = shlex.split(line.removeprefix(name), comments=True)
    asked = words[:2] if words[0] in ("plan", "bench") else words[:1]
    told = CliRunner().invoke(import_module(PROGRAMS[name]).app, [*asked, "--help"], env={"COLUMNS": "300"})
    assert told.exit_code == 0, told.output
    for option in (word for word in words if word.startswith("--")):
        assert option in told.output
