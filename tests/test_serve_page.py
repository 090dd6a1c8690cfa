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
# Headless windows have a least width, so that a phone's is set by a frame.
PHONE = '<body style="margin:0"><iframe src="{}" style="border:0;width:390px;height:1200px"></iframe>'


def picture(address, name, width, height, theme, *more):
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"serve-{name}-{theme}.png"
    with tempfile.TemporaryDirectory() as profile:
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--window-size={width},{height}",
            f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={int(theme == 'light')}", *more,
        ]  # fmt: skip
        done = subprocess.run([*command, f"--screenshot={path}", address], check=True, capture_output=True, timeout=60)
        dom = subprocess.run([*command, "--dump-dom", address], check=True, capture_output=True, timeout=60)
    assert b"Uncaught" not in done.stderr
    return np.asarray(Image.open(path).convert("L")), dom.stdout.decode()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_shows_what_runs(byte_tokenizer, monkeypatch):
    engine = make_served(copy.deepcopy(byte_tokenizer))
    run = engine.reader.run
    monkeypatch.setattr(engine.reader, "run", lambda work: (time.sleep(0.2), run(work)))
    with listening(engine) as (_, address):
        asked = [engine.submit([5] * 60, Sampling(max_new_tokens=140)) for _ in range(6)]
        until(lambda: engine.running == 4)
        image, dom = picture(address, "desk", 1280, 1000, "dark", "--virtual-time-budget=3500")
        for request in asked:
            request.cancel()
    assert "4 / 4" in dom
    assert "decoding" in dom
    assert np.median(image) < 40
