"""Long English texts that every Python has, of which no word is downloaded: the docstrings of its library."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path

_SHORTEST = 200  # letters; shorter docstrings say little


@lru_cache(maxsize=1)
def docstrings() -> str:
    """The docstrings of the standard library, file by file: more than a million letters.

    Calibration reads other texts (`redknot_hf.profiling.python_texts`: the language reference).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"} & set(path.parts):
            found += _of(path)
    return "\n\n".join(found)


def fingerprint() -> str:
    """A hash of the docstrings, `sha256:` and 16 digits: they differ from one Python to another."""
    return f"sha256:{hashlib.sha256(docstrings().encode()).hexdigest()[:16]}"


def _of(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # templates and the like, which are no programs
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    said = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in said if text and len(text) >= _SHORTEST]
