"""The page at `/` in a real browser, if there is one; pictures stay in runs/test_screenshots to be looked at."""

import copy
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from listening import listening, make_served, until
from PIL import Image

from evals.screenshot import BROWSERS
from redknot_hf.serving import Sampling

OUT = Path(__file__).parents[1] / "runs" / "test_screenshots"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def browse(address, *more):
    """What Chromium makes of a page a few seconds later."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--virtual-time-budget=3500", f"--user-data-dir={profile}", *more, address,
        ]  # fmt: skip
        return subprocess.run(command, check=True, capture_output=True, timeout=60, text=True)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_shows_what_runs(byte_tokenizer, monkeypatch):
    engine = make_served(copy.deepcopy(byte_tokenizer))
    run = engine.reader.run
    monkeypatch.setattr(engine.reader, "run", lambda work: (time.sleep(0.2), run(work)))
    OUT.mkdir(parents=True, exist_ok=True)
    with listening(engine) as (_, address):
        asked = [engine.submit([5] * 60, Sampling(max_new_tokens=140)) for _ in range(6)]
        until(lambda: engine.running == 4)
        dom = browse(address, "--dump-dom", "--enable-logging=stderr")
        for theme, ground in (("dark", 0), ("light", 1)):
            options = f"--screenshot={OUT}/serve-{theme}.png", f"--blink-settings=preferredColorScheme={ground}"
            browse(address, *options, "--window-size=520,1200")
        for request in asked:
            request.cancel()
    assert "Uncaught" not in dom.stderr
    assert "Content Security Policy" not in dom.stderr
    body = dom.stdout[dom.stdout.index("<body") : dom.stdout.index("<script")]
    assert "4 / 4" in body
    assert "/ 140" in body
    assert ">local " in body
    for theme in ("dark", "light"):
        image = np.asarray(Image.open(OUT / f"serve-{theme}.png").convert("L")).astype(int)
        ground = np.median(image)
        assert ground < 40 if theme == "dark" else ground > 230
        ink = np.abs(image - ground) > 60
        assert ink.mean() > 0.005, "something is written on it"
        assert not ink[:, -4:].any(), "nothing runs out at the right"
