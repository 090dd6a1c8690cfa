"""Texts to calibrate on: a file's, a data set's, or those that come with Python."""

from __future__ import annotations

from pathlib import Path


def read_texts(source: str, limit: int = 64, *, split: str = "train", column: str | None = None) -> list[str]:
    """Reads texts of a file (.txt, .json, .jsonl, .csv, .parquet) or of a data set of the Hub, by its id.

    Args:
        limit: Texts to read at most.
        split: Of the data set.
        column: Which one holds the text; by default "text", or else the first that holds strings.

    Raises:
        FileNotFoundError: The source is a path and there is no such file.
        ImportError: `datasets` is not installed.
        ValueError: There is no column of strings.
    """
    path = Path(source)
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise ImportError(f"reading {source} needs datasets: pip install 'redknot-hf[cli]', or give a .txt") from e
    builders = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix in builders:
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist: give a file, or the id of a data set of the Hub")
        rows = load_dataset(builders[path.suffix], data_files=source, split="train", streaming=True)
    else:
        rows = load_dataset(source, split=split, streaming=True)
    found = list(rows.take(limit))
    strings = [name for name, entry in (found[0] if found else {}).items() if isinstance(entry, str)]
    column = column or ("text" if "text" in strings else next(iter(strings), None))
    if column not in strings:
        raise ValueError(f"{source} has no column {column or 'of strings'}: name one of {strings}")
    return [row[column] for row in found]


def python_texts() -> list[str]:
    """Python's own documentation of the language, which every Python has: half a million letters of English."""
    from pydoc_data.topics import topics

    return ["\n\n".join(topics[name] for name in sorted(topics))]
