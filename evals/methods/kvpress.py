"""Presses of kvpress (NVIDIA), which run in a virtual environment of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-kvpress" / "bin" / "python"
PACKAGES = ("torch", "transformers", "kvpress")


@dataclass(frozen=True)
class Press:
    """A press at a share that is kept of all keys and values.

    Attributes:
        name: How reports call it.
        press: Its name in `evals.kvpress_worker.PRESSES`.
        kept: The share, over 0 and up to 1.
    """

    name: str
    press: str
    kept: float

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this method and no other."""
        return {"press": self.press, "kept": self.kept}


def press(name: str, kept: float) -> Press:
    """Return a press.

    Raises:
        ValueError: The share is out of range.
        FileNotFoundError: The environment of kvpress is not there.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept={kept}: give the share of keys and values that the press keeps, over 0 and up to 1")
    if not PYTHON.exists():
        raise FileNotFoundError(f"{PYTHON} is missing: make .venv-kvpress/.ready")
    return Press(f"kvpress, {name}", name, round(kept, 4))
