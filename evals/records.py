"""JSON lines that a run leaves behind, and that it goes on from after a stop.

A file holds lines of two kinds. A run says what produced its answers: task, length, seed, model, method, versions. An
answer, or why there is none, belongs to a run by the run's key, which is a hash of all that. A line that a kill has
torn is cut off when the file is opened again, and its answer made anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from evals.identity import digest


@dataclass(frozen=True)
class Run:
    """What produced a series of answers.

    Attributes:
        task, length, seed: Which examples.
        model: See `model_identity`.
        method: Name and identity of the method.
        versions: Of the packages.
        hardware: What it ran on, and the batch size; no part of the key.
    """

    task: str
    length: int
    seed: int
    model: dict[str, Any]
    method: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]

    @property
    def key(self) -> str:
        """A hash of all that decides the answers."""
        return digest([self.task, self.length, self.seed, self.model, self.method, self.versions])

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method["name"]

    def to_json(self) -> dict[str, Any]:
        return {"run": self.key, **vars(self)}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Run:
        return cls(**{name: value for name, value in line.items() if name != "run"})


@dataclass
class Records:
    """The runs of one or more files, and their answers.

    Attributes:
        runs: By key.
        answers: By key of the run and id of the example.
        failures: By key of the run, why its method gave up the last time.
    """

    runs: dict[str, Run]
    answers: dict[tuple[str, str], dict[str, Any]]
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, paths: Iterable[Path]) -> Records:
        """Read files that runs have written; a last line that a kill has torn is left out.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: Another line is damaged, or an answer belongs to no run.
        """
        records = cls({}, {})
        for path in paths:
            for line in _lines(path, path.read_bytes())[0]:
                records.add(line, path)
        return records

    def add(self, line: dict[str, Any], source: Path) -> None:
        """Take a line of a file.

        Raises:
            ValueError: It is an answer that belongs to no run.
        """
        if "task" in line:
            run = Run.from_json(line)
            self.runs.setdefault(run.key, run)
        elif line["run"] in self.runs and "failed" in line:
            self.failures[line["run"]] = line["failed"]
        elif line["run"] in self.runs:
            self.failures.pop(line["run"], None)  # it goes on
            self.answers.setdefault((line["run"], line["id"]), line)
        else:
            raise ValueError(f"{source} has an answer of run {line['run']}, which it does not describe")


class RecordFile:
    """A file of records, open for adding to; entering it reads what it holds.

    Every line is on disk when the call that adds it returns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = self.path.read_bytes() if self.path.exists() else b""
        lines, whole = _lines(self.path, held)
        self.records = Records({}, {})
        for line in lines:
            self.records.add(line, self.path)
        self._file = self.path.open("r+b" if held else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._file.close()

    def begin(self, run: Run) -> None:
        """Describe a run, once."""
        if run.key not in self.records.runs:
            self._write([run.to_json()])

    def has(self, run: Run, example: str) -> bool:
        """Whether the answer to an example is there."""
        return (run.key, example) in self.records.answers

    def add(self, run: Run, answers: Iterable[dict[str, Any]]) -> None:
        """Add answers of a run that has begun; each names its example as `id`."""
        self._write([{"run": run.key, **answer} for answer in answers])

    def fail(self, run: Run, reason: str) -> None:
        """Say why a run that has begun stops; the next one goes on from here."""
        self._write([{"run": run.key, "failed": reason}])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self.records.add(line, self.path)
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _lines(path: Path, held: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of a file, and the bytes up to the end of the last whole one."""
    whole = held.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(held[:whole].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as e:
            raise ValueError(f"{path}, line {number} is damaged: {e}. Remove the line, and run again") from e
    return lines, whole
