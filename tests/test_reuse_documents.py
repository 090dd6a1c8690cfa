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
