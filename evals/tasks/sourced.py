"""A task that reads files of the user's, whose name tells which: answers from other files are other answers."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.task import Example, Task


@dataclass(frozen=True, slots=True)
class Sourced:
    """A task and the source it reads.

    Attributes:
        task: What makes the examples.
        source: A file or a folder.
    """

    task: Task
    source: Path

    @property
    def name(self) -> str:
        """The task's name, the source's, and eight digits that stand for its content."""
        return f"{self.task.name} of {self.source.name} {content_hash(self.source)}"

    @property
    def metric(self) -> str:
        """The task's metric."""
        return self.task.metric

    def examples(self, tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Example]:
        """See `Task.examples`."""
        return self.task.examples(tokenizer, length, count, seed)


def content_hash(source: Path) -> str:
    """Return eight digits that stand for a file's bytes, or for the names and sizes of a folder's files.

    Raises:
        FileNotFoundError: There is no such file or folder.
    """
    if not source.exists():
        raise FileNotFoundError(f"the source {source} is neither a file nor a folder")
    found = hashlib.sha256()
    if source.is_file():
        found.update(source.read_bytes())
    else:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            found.update(f"{path.relative_to(source).as_posix()} {path.stat().st_size}\n".encode())
    return found.hexdigest()[:8]
