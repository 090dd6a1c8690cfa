"""kvpress at work, as a process of its own virtual environment that gets token ids and returns records."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from evals.bench import BUNDLED, Bench
from evals.methods.kvpress import PACKAGES, PYTHON, ROOT, Press
from evals.questions import Group


class PressWorker:
    """A process that answers with presses; entering starts it.

    Its dense reference is its own, made by its own transformers.
    """

    def __init__(self, bench: Bench, presses: Sequence[Press]) -> None:
        self.bench, self.presses = bench, presses

    @staticmethod
    def versions() -> dict[str, str]:
        """Return the versions that it runs with."""
        code = "import importlib.metadata as m, json, platform, sys; print(json.dumps({'python': "
        code += "platform.python_version()} | {name: m.version(name) for name in sys.argv[1:]}))"
        done = subprocess.run([str(PYTHON), "-c", code, *PACKAGES], check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [str(PYTHON), "-m", "evals.kvpress_worker"], env=environment, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        name = str(BUNDLED) if self.bench.name == "bundled" else self.bench.name
        self._send(
            {
                "model": name,
                "dtype": str(self.bench.model.dtype).removeprefix("torch."),
                "device": self.bench.model.device.type,
                "threads": torch.get_num_threads(),
                "end": sorted(self.bench.reader.end),
                "presses": [vars(press) for press in self.presses],
            }
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self.process.stdin
        assert self.process.stdout
        if kind is not None:
            self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        if self.process.wait() and kind is None:
            raise RuntimeError(f"the worker of kvpress ended with status {self.process.returncode}: see above")

    def ask(
        self, group: Group, left: dict[str, set[str]], keep: Callable[[str, Group, list[dict[str, Any]]], None]
    ) -> None:
        """Ask a group's open questions, one context at a time.

        Raises:
            RuntimeError: The worker ended early.
        """
        for row in sorted(set(group.asked.rows)):
            same = {e.id for e, at in zip(group.examples, group.asked.rows, strict=True) if at == row}
            part = group.only(same)
            open_ones = {name: sorted(ids & same) for name, ids in left.items() if ids & same}
            if not open_ones:
                continue
            self._send(
                {
                    "context": part.asked.context.rows[0].tolist(),
                    "questions": {
                        example.id: {
                            "ids": question.ids.tolist(),
                            "max_new_tokens": question.max_new_tokens,
                            "stop": example.stop,
                            "given": question.given,
                        }
                        for example, question in zip(part.examples, part.asked.questions, strict=True)
                    },
                    "left": open_ones,
                }
            )
            for name in open_ones:
                answers = self._receive()
                keep(name, part.only(set(answers)), [answers[e.id] for e in part.examples if e.id in answers])

    def _send(self, line: dict[str, Any]) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as e:
            raise RuntimeError("the worker of kvpress has ended: see above") from e

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the worker of kvpress has ended: see above")
        return json.loads(line)
