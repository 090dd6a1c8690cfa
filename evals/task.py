"""What a task is: examples to ask a model, and how their answers are judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one context.

    The prompt is `context + question + answer_prefix`, as text; the context (each of its documents, if it has some)
    and the rest are tokenized apart, so that a context can be read once and asked several questions.

    Attributes:
        id: Names the example within its task, length and seed.
        context: What is read first. Several examples in a row may share it.
        question: What is asked.
        answers: What is right; the metric says whether one of them is wanted or all.
        max_new_tokens: Tokens the model may answer with.
        answer_prefix: Words put into the model's mouth, after which the answer begins; metrics do not see them.
        stop: Text that ends an answer; `None` leaves it to the model's end-of-sequence tokens.
        kind: Part of the task the example belongs to, reported apart ("single document", "two hops").
        documents: The context's parts, in order, for methods that reuse them; joined they are the context. The first
            is what stands before the documents (an instruction, a token that begins the text).
        choices: All answers that are offered, for metrics that must know them.
        given: Whether `answers[0]` is not to be decoded but given, to measure how likely it is.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""
    stop: str | None = None
    kind: str = ""
    documents: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    given: bool = False


class Task(Protocol):
    """A source of examples.

    Attributes:
        name: As on the command line.
        metric: Name of a module in `evals/metrics`, which judges the answers; "likelihood" where they are given.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str: ...

    def examples(self, tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Example]:
        """Yields `count` examples whose prompts have at most `length` tokens of this tokenizer.

        The same arguments yield the same examples.

        Raises:
            ValueError: The length is too short for the task, or the data set has fewer examples.
        """
        ...
