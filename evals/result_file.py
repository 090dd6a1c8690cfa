"""Files of results: JSON lines that say what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evals.identity import hardware, versions


def write_line(file: Path | None, row: Mapping[str, Any], device: torch.device, **more: Any) -> None:
    """Prints a row as one line of JSON, and appends it to a file if there is one.

    Args:
        file: Made if it is not there, its folder too.
        row: What was measured.
        device: Which the measurement ran on; with it the versions of Python, torch and transformers are written.
        more: What else is to be known of the hardware.
    """
    about = {**hardware(device), **versions(("torch", "transformers")), **more}
    line = json.dumps({**row, "hardware": about})
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(line + "\n")
    print(line, flush=True)
