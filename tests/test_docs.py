"""The code blocks of README and docs run, on a small model and in the order in which they stand on their page."""

import re
import shlex
from importlib import import_module
from importlib.metadata import metadata

import pytest
import torch
from families import make_model
from pages import BLOCK, ROOT, blocks, recipe
from pages import PAGES as ALL
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import redknot_hf
import redknot_hf.profiling
from redknot_hf import HeadPlan, HeadSpec

PAGES = [page for page in ALL if page == ROOT / "README.md" or page.parent == ROOT / "docs"]
# What the pages take as given: figures are cut to what a small model reads in seconds.
SMALLER = {"length=4096": "length=400", "(128, 256, 512, 1024)": "(16, 64)", "33_000": "2_000", "count=8": "count=6"}


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
    for code in blocks(page, "python"):
        for long, short in SMALLER.items():
            code = code.replace(long, short)
        exec(compile(code, str(page), "exec"), given)


PROGRAMS = {
    "redknot": "redknot_cli",
    "python -m evals": "evals.__main__",
    "python -m evals.real": "evals.real.__main__",
}
GROUPS = ("plan", "bench", "eval")  # commands that have commands


def named(beginning):
    """What sentences name in a span of code that begins so; `test_shell.py` runs the lines of shell blocks."""
    spans = [span for page in ALL for span in re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text()))]
    return sorted({" ".join(span.split()) for span in spans if span.startswith(f"{beginning} ")})


@pytest.mark.parametrize("line", [line for name in PROGRAMS for line in named(name)])
def test_commands_that_sentences_name_have_their_options(line):
    name = next(name for name in PROGRAMS if line.startswith(f"{name} "))
    first, *words = shlex.split(line.removeprefix(name))
    groups = words.pop(0).split("|") if first in GROUPS and words and words[0][0] != "-" else [None]
    for asked in ([first, group] if group else [first] for group in groups):
        told = CliRunner().invoke(import_module(PROGRAMS[name]).app, [*asked, "--help"], env={"COLUMNS": "300"})
        assert told.exit_code == 0, told.output
        for option in (word for word in words if word.startswith("--")):
            assert option == "--help" or option in told.output


def test_extras_and_targets_that_pages_name_are_there():
    provided = metadata("redknot-hf").get_all("Provides-Extra")
    listed = [names for page in ALL for names in re.findall(r"redknot-hf\[([\w,-]+)\]", page.read_text())]
    assert {name for names in listed for name in names.split(",")} <= set(provided)
    targets = {span.split()[1] for span in named("make")}
    assert {"speed", "real"} <= targets
    for target in targets:
        recipe(target)
