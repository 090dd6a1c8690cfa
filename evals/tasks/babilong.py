"""BABILong (Kuratov et al. 2024): facts of bAbI strewn over books, and questions that take one to three of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.task import Example
from evals.tasks.hub import Row, read
from evals.tasks.length import prompt_tokens

DATA_SET = "RMT-team/babilong"
LENGTHS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # thousands of tokens of the context, by configuration
INSTRUCTION_TOKENS = 250  # what the instruction may add to a context of that length

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
# By task: what is asked, how to answer, and all answers there are.
TASKS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "qa1": (
        "where people are. Whoever has been in several places is in the latest",
        "The most recent location of 'person' is 'location'.",
        PLACES,
    ),
    "qa2": (
        "where people are and what they carry. What is carried moves along; what is dropped stays",
        "The 'item' is in 'location'.",
        PLACES,
    ),
    "qa3": (
        "where people are and what they carry. What is carried moves along; what is dropped stays",
        "Before the 'location 1' the 'item' was in the 'location 2'.",
        PLACES,
    ),
    "qa4": ("how places lie to each other", "'location'", PLACES),
    "qa5": (
        "who gives what to whom",
        "'person' or 'item'",
        ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    ),
    "qa6": ("where people are. Whoever has been in several places is in the latest", "yes or no", ("yes", "no")),
    "qa7": ("what people carry", "a number in words, or none", ("none", "one", "two", "three")),
    "qa8": (
        "what people carry",
        "the item, or the items with a comma between them, or nothing",
        ("apple", "football", "milk", "nothing"),
    ),
    "qa9": ("where people are, and where they are not", "yes or no", ("yes", "no")),
    "qa10": ("where people are, or may be", "yes or no or maybe", ("yes", "no", "maybe")),
}
NAMES = tuple(f"babilong/{task}" for task in TASKS)


@dataclass(frozen=True, slots=True)
class Babilong:
    """One of BABILong's tasks, from the longest configuration that fits."""

    name: str
    source: str | None
    metric: str = "only_label"

    def examples(self, tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Example]:
        """See `Task.examples`. What is too long with its instruction is left out; a larger count only appends."""
        if length < INSTRUCTION_TOKENS:
            raise ValueError(f"{self.name} needs at least {INSTRUCTION_TOKENS} tokens, length is {length}")
        config = max(known for known in LENGTHS if 1000 * known + INSTRUCTION_TOKENS <= length)
        rows = read(DATA_SET, f"{config}k", self.name.split("/")[1], self.source)
        found = 0
        for place in np.random.default_rng(seed).permutation(len(rows)).tolist():
            if found == count:
                return
            example = self._example(rows[place], f"{self.name}-{config}k-{place}")
            if prompt_tokens(tokenizer, example) <= length:
                found += 1
                yield example
        if found < count:
            raise ValueError(
                f"{self.name} has {found} questions (of {len(rows)}) that fit {length} tokens, count is {count}"
            )

    def _example(self, row: Row, name: str) -> Example:
        about, form, labels = TASKS[self.name.split("/")[1]]
        asked = row["question"].lower()
        return Example(
            id=name,
            context="A long text is given to you. Strewn over it are facts about "
            f"{about}. Answer the question at its end from these facts alone, in this form and without another "
            f"word: {form}\n<context>\n{row['input']}\n</context>\n",
            question=f"Question: {row['question']}\n",
            answers=(row["target"],),
            max_new_tokens=20,
            answer_prefix="Answer:",
            choices=tuple(label for label in labels if label.lower() not in asked),
        )


def load(name: str, source: str | None) -> Babilong:
    """Return the task of this name; a source is a folder with the data set's files."""
    return Babilong(name, source)
