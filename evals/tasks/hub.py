"""Data sets of the Hugging Face Hub, or a copy of one in a folder."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def read(data_set: str, config: str | None, split: str, source: str | None) -> Sequence[Row]:
    """Return the rows of one configuration and split.

    Args:
        data_set: Its id on the Hub.
        config: Which of its configurations; `None` if it has one.
        split: Which of its splits.
        source: A folder that holds the repository (its README.md names the files), to read in place of the Hub.

    Raises:
        ConnectionError: There is no source, and the Hub cannot be reached and has not been read before.
    """
    from datasets import load_dataset  # on demand: it is slow to import, and only these tasks need it

    try:
        return load_dataset(source or data_set, config, split=split)
    except ConnectionError as error:
        raise ConnectionError(
            f"{data_set} could not be read from the Hub: go online, or give a folder with its files as the source"
        ) from error
