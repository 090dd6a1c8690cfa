import json
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "reuse_documents.py"


def test_the_example_runs(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    size = ["--documents", "2", "--tokens", "96", "--questions", "2", "--orders", "1"]
    for again in range(2):
        assert main([*size, "--store", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert ("3 computed" in said) is not bool(again)
        assert "100%" in said


def test_the_notebook_runs_and_shows_what_naive_reuse_loses(monkeypatch):
    monkeypatch.chdir(EXAMPLE.parent)
    cells = json.loads(EXAMPLE.with_suffix(".ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = {}
    exec(compile(code.replace("tokens=512", "tokens=96"), "notebook", "exec"), names)
    some, asked = names["parts"]["facts through several documents"]
    assert names["right"](some, asked, boundary=0) < names["right"](some, asked, boundary="all") == len(asked)
