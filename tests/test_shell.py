"""What pages say to type into a shell runs: line by line, in the order of the page, with a small model."""

import asyncio
import json
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path

import httpx2 as httpx
import pytest
from pages import BLOCK, PAGES, ROOT, blocks, line_of, lines, recipe, typed
from services import redis_server
from typer.testing import CliRunner

from redknot_hf import HeadPlan
from redknot_hf.serving.server import running

TINY = ROOT / "evals" / "tiny"
QUESTION = json.loads(typed("curl")[-1])
# What pages take as given, and the sizes that are cut.
INSTEAD = {
    "MODEL": str(TINY), "M": str(TINY), "TASK": "tiny/code", "HuggingFaceTB/SmolLM2-135M-Instruct": str(TINY),
    "meta-llama/Llama-3.1-8B-Instruct": str(TINY), "meta-llama/Llama-3.1-70B-Instruct": str(TINY),
    "7168": "240", "4096": "240", "2048": "240", "32768": "240", "24": "2", "24GiB": "64MiB",
}  # fmt: skip
# What is said besides: counts, which pages leave to their defaults.
BESIDES = {
    "redknot profile": "--prompts 4 --windows 16 --dtype float32",
    "redknot gate": "--prompts 2 --dtype float32",
    "redknot serve": "--port 0 --memory 64MiB --dtype float32",
    "python -m evals run": "--count 2",
    "python -m evals gate": "--count 2 --length 240",
    "python -m evals offline": "--count 2 --length 240 --method dense --method redknot",
    "python -m evals bench speed": "--model bundled --length 64 --tokens 2 --repeats 1",
    "python -m evals bench ranks": "--shape toy --device cpu --requests 3 --length 100 --new 8 --memory 8MiB",
    "python kernels/build.py": "--out build",
}
PROGRAMS = {"redknot": "redknot_cli", "python -m evals": "evals.__main__"}


@cache
def elsewhere():
    """Lines that other tests take from the pages, and run."""
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    return {line_of(beginning) for text in texts for beginning in re.findall(r'typed\("([^"]+)"', text)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as a reader's, with the plan and the method that pages take as written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    HeadPlan.load(TINY / "plan.json").save("plan.json")
    Path("mine.py").write_text(*blocks(ROOT / "evals" / "README.md", "python"))
    return tmp_path


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", [page for page in PAGES if [*lines(page)]], ids=lambda page: page.name)
def test_lines_of_a_page_run_in_their_order(page, place, monkeypatch):
    # Figures are drawn, and not painted, which takes longest.
    monkeypatch.setattr("evals.figures.render", lambda draw, style, form: draw(style) and b"")
    monkeypatch.setattr("redknot_hf.profiling.fisher._DRAWN", 1)
    for line in (line for line in lines(page) if line not in elsewhere()):
        run([*line.words])


def test_blocks_say_what_they_are():
    """So that none is left out: one without a language would be no shell's, and not run."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert {kind for kind, _ in BLOCK.findall(text)} <= {"python", "sh", "text", "bibtex"}, page.name
        assert not re.findall(r"^(?: {4}|~~~).*", BLOCK.sub("", text), re.M), page.name


def run(words):
    """Runs a line, cut to what a small model does in seconds; what it writes must be there."""
    runner, more = (next((x for name, x in of.items() if begins(words, name)), None) for of in (RUNNERS, BESIDES))
    assert runner, f"no test runs {shlex.join(words)}: name it in RUNNERS, or ask for it by `typed` where it is run"
    words = [INSTEAD.get(word, word) for word in words]
    runner([*words, *shlex.split(more or "")])
    for option, value in pairwise(words):
        if option in ("--out", "--results"):
            assert Path(value).exists(), value


def begins(words, name):
    return words[: len(name.split())] == name.split()


def command(words):
    """A command of ours, in this process. A gate's exit status says whether the plan holds."""
    name = next(name for name in PROGRAMS if begins(words, name))
    app = import_module(PROGRAMS[name]).app
    done = CliRunner().invoke(app, words[len(name.split()) :])
    fails = "gate" in words and ("does not hold" in done.output or done.output.startswith("FAILS"))
    assert done.exit_code == fails, (done.output, done.exception)


def serve(words):
    """A server, which is asked README's question and ends when it has answered."""
    asked = []

    class Asked(running.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            asked.append(asyncio.create_task(asyncio.to_thread(self.ask, sockets[0].getsockname()[1])))

        def ask(self, port):
            address = f"http://127.0.0.1:{port}/v1"
            try:
                stored = httpx.post(f"{address}/segments", json={"input": "the code of the school"}, timeout=60)
                assert stored.status_code == (200 if "--store" in words else 400), stored.text
                answer = httpx.post(f"{address}/completions", json=QUESTION | {"stream": False}, timeout=60)
                return answer.json()["choices"][0]["text"]
            finally:
                self.should_exit = True

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(running, "Server", Asked)
        shared = "redis://127.0.0.1:6379/0"
        if shared in words:
            words[words.index(shared)] = stack.enter_context(redis_server(Path.cwd())).url
        command(words)
    assert asked.pop().result().startswith("3 0 5 3 .")


def install(words):
    """As far as pip goes without an index: that what is named is there, and has the extra. Once for all pages."""
    install_once(*words)


@cache
def install_once(*words):
    dry = ["--dry-run", "--no-index", "--no-build-isolation"]
    done = subprocess.run([sys.executable, "-m", *words, *dry], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "does not provide the extra" not in done.stderr, done.stderr


def make(words):
    """What a target runs is run here, but for what CI runs itself, the tests among it."""
    made = re.findall(r"^make (.*)", (ROOT / ".ci" / "run").read_text(), re.M)
    by_ci = recipe(*(word for line in made for word in line.split() if re.fullmatch(r"[a-z]+(-[a-z]+)?", word)))
    for line in recipe(*words[1:]):
        if line not in by_ci:
            run(line)


def activate(words):
    """What the environment's script puts first on the path, in which the commands of the pages are."""
    shell, script = words[0], Path(sys.prefix) / "bin" / Path(words[1]).name
    does = f"{shell} {shlex.quote(str(script))} && command -v python"
    said = subprocess.run(["bash", "-c", does], capture_output=True, text=True, check=True)
    assert Path(said.stdout.strip()) == Path(sys.prefix) / "bin" / "python"
    assert entry_points(group="console_scripts")["redknot"].value == "redknot_cli:app"


def program(words):
    """A file of the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")


RUNNERS = {
    "redknot serve": serve, "redknot": command, "python -m evals": command, "python kernels/build.py": program,
    "pip install": install, "make": make, ".": activate,
}  # fmt: skip
