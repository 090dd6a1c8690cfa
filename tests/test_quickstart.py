import runpy

from pages import ROOT, recipe, typed


def test_quickstart(tmp_path, capsys):
    figure = tmp_path / "bytes.png"
    ((_, example, *words),) = recipe(typed("make demo")[1])
    main = runpy.run_path(str(ROOT / example))["main"]
    assert main([*words, "--length", "1024", "--questions", "4", "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "RedKnotCache" in capsys.readouterr().out
