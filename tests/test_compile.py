"""Captured decoding, in a process without the run-time checks of shapes: see `compiled_cases.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.core
def test_captured_decoding():
    cases = Path(__file__).with_name("compiled_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cases.parents[1], check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
