"""Tasks, each a small file: its examples, its prompt and the metric that judges it."""

from pathlib import Path
from typing import Protocol

from evals.task import Task
from evals.tasks import babilong, key_value, multihop, needle, perplexity, rendered, ruler, tiny
from evals.tasks.sourced import Sourced


class Family(Protocol):
    """A module of tasks that are made alike."""

    @property
    def NAMES(self) -> tuple[str, ...]: ...  # noqa: N802 - a module's constant

    def load(self, name: str, source: str | None) -> Task:
        """Return the task of one of these names; a source is a file or a folder to read in place of the usual one."""
        ...


FAMILIES: tuple[Family, ...] = (tiny, ruler, needle, key_value, perplexity, multihop, rendered, babilong)


def names() -> tuple[str, ...]:
    """Return the names of all tasks."""
    return tuple(name for family in FAMILIES for name in family.NAMES)


def load(name: str, source: str | None = None) -> Task:
    """Return the task of this name.

    Args:
        name: One of `names()`.
        source: A local file or folder to read in place of what the task reads by itself (a data set of the Hub,
            bundled passages), in the same format. It becomes part of the task's name.

    Raises:
        ValueError: There is no such task, or it reads no source.
    """
    for family in FAMILIES:
        if name in family.NAMES:
            task = family.load(name, source)
            return task if source is None else Sourced(task, Path(source).resolve())
    near = [known for known in names() if known.split("/")[0] == name.split("/")[0]] or names()
    raise ValueError(f"no task is called {name!r}: choose one of {', '.join(near)}")
