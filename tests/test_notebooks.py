"""The notebooks run, on less text than they show, and what they say comes true; `reuse_documents` has its own test."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALLER = {
    "collection(2048, 8,": "collection(600, 4,",
    "max_len=3072": "max_len=768",
}


@pytest.fixture
def ran(monkeypatch, request):
    """The names of a notebook once its cells have run, and what they printed."""
    monkeypatch.chdir(EXAMPLES)
    mpl.use("agg")
    names = {}
    cells = json.loads((EXAMPLES / f"{request.param}.ipynb").read_text())["cells"]
    assert all(cell["outputs"] or cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    for code in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        for long, short in SMALLER.items():
            code = code.replace(long, short)
        exec(compile(code, request.param, "exec"), names)
    plt.close("all")
    return names


@pytest.mark.parametrize("ran", ["first_steps"], indirect=True)
def test_first_steps(ran):
    assert ran["same"]
    assert ran["kept"] == ran["dense"] != ran["lost"]
    assert ran["everything"].nbytes < ran["before"]


@pytest.mark.parametrize("ran", ["profile_your_model"], indirect=True)
def test_profile_your_model(ran):
    assert len(ran["bytes_kept"]) == len(ran["foretold"]) > 3
    assert ran["found"] > 5


@pytest.mark.parametrize("ran", ["serve_and_measure"], indirect=True)
def test_serve_and_measure(ran):
    assert ran["right"] == len(ran["requests"])
    assert all(request.cached > 500 for request in ran["requests"])
