"""JSON files that hold an object, and what is said of those that do not."""

import json
import reprlib
from pathlib import Path
from typing import Any


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Read an object.

    Args:
        path: The file.
        fix: What to do if it holds none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise error(path, f"is not JSON ({e})", fix) from e
    if not isinstance(data, dict):
        raise error(path, f"holds {reprlib.repr(data)}, not an object", fix)
    return data


def error(path: Path, problem: str, fix: str) -> ValueError:
    """Say of a file what is wrong and how to mend it."""
    return ValueError(f"{path}: {problem}; {fix}")
