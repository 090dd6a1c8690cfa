import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "quickstart.py"


def test_quickstart(tmp_path, capsys):
    figure = tmp_path / "bytes.png"
    main = runpy.run_path(str(EXAMPLE))["main"]
    assert main(["--length", "1024", "--questions", "4", "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "RedKnotCache" in capsys.readouterr().out
