"""The report's page in a real browser, if there is one; pictures stay in runs/test_screenshots to be looked at."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluated import records
from pages import typed
from PIL import Image

from evals.report import write_report
from evals.screenshot import BROWSERS, SIZES, main, screenshots
from evals.summary import summarize

OUT = Path(__file__).parents[1] / "runs" / "test_screenshots"


def test_without_a_browser_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install chromium"):
        screenshots(tmp_path / "page.html", tmp_path)
    with pytest.raises(SystemExit, match=r"^error: none of chromium.* is installed: apt-get install chromium$"):
        main(typed("python -m evals.screenshot")[3:])


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium here")
def test_the_page_is_light_and_dark_at_desk_and_phone(capsys):
    rows = summarize(records(dense=[1] * 60, redknot=[1] * 59 + [0]), kinds=True)
    main(typed("python -m evals.screenshot", {"runs/x/report.html": write_report(rows, OUT)})[3:])
    pictures = {path.stem: path for path in map(Path, capsys.readouterr().out.splitlines())}
    assert {path.parent for path in pictures.values()} == {OUT}
    assert set(pictures) == {f"{theme}-{size}" for theme in ("light", "dark") for size in SIZES}
    for name, path in pictures.items():
        theme, size = name.split("-")
        image = np.asarray(Image.open(path).convert("L"))
        assert image.shape[1] == SIZES[size][0]
        assert image.shape[0] > 1000, "the whole page"
        ground = np.median(image)
        assert ground > 230 if theme == "light" else ground < 40
        ink = np.abs(image.astype(int) - ground) > 60
        assert ink.mean() > 0.005, "something is written on it"
        assert not ink[:, -4:].any(), "nothing runs out at the right"
