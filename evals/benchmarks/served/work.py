"""How much each part of the serving benchmark does, by shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """How much of it.

    Attributes:
        requests: How many at once.
        length: Tokens of a prompt.
        new: Tokens of an answer.
        memory: Pages of the engine.
    """

    requests: int
    length: int
    new: int
    memory: str


WORKS = {
    "8b": {
        "host": Work(64, 512, 204, "8GiB"),
        "prefix": Work(32, 16384 + 64, 8, "24GiB"),
        "swap": Work(1, 32768, 60, "4GiB"),
        "arrivals": Work(64, 8192, 256, "11GiB"),
        "decoding": Work(32, 32768, 512, "24GiB"),
        "peer": Work(16, 2048, 64, "8GiB"),
    },
    "toy": {
        "host": Work(2, 70, 16, "8MiB"),
        "prefix": Work(2, 320 + 64, 2, "32MiB"),
        "swap": Work(1, 150, 12, "8MiB"),
        "arrivals": Work(2, 1300, 8, "3MiB"),
        "decoding": Work(2, 130, 104, "8MiB"),
        "peer": Work(2, 40, 4, "8MiB"),
    },
}
# Each is a function of its name in the module of its name.
PARTS = tuple(WORKS["8b"])
