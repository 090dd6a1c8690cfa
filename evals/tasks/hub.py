"""Data sets of the Hugging Face Hub, or a copy of one in a folder."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

Row = Mapping[str, Any]


class Rows(Protocol):
    """Rows that are read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Row: ...


def read(data_set: str, config: str | None, split: str, source: str | None, task: str | None = None) -> Rows:
    """Return the rows of one configuration and split.

    Args:
        data_set: Its id on the Hub.
        config: Which of its configurations; `None` if it has one.
        split: Which of its splits.
        source: A folder that holds the repository (its README.md names the files), to read in place of the Hub.
        task: Return only rows whose column `task` says so.

    Raises:
        ConnectionError: There is no source, and the Hub cannot be reached and has not been read before.
    """
    from datasets import Dataset, load_dataset  # on demand: slow to import, and only these tasks need it

    try:
        rows = cast(Dataset, load_dataset(source or data_set, config, split=split))
    except ConnectionError as error:
        raise ConnectionError(
            f"{data_set} could not be read from the Hub: go online, or give a folder with its files as the source"
        ) from error
    if task is not None:
        rows = rows.select([place for place, found in enumerate(rows["task"]) if found == task])
    return cast(Rows, rows)
