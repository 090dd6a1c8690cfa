"""Questions about passages: the prompt that holds them, each a document of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.task import Example

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)


@dataclass(frozen=True, slots=True)
class Passage:
    """A titled text."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A question, its answers, the passages that answer it, and others that came with it.

    Attributes:
        id: As the source calls it.
        question: What is asked.
        answers: Any of them is right.
        needed: Passages without which it cannot be answered.
        others: Passages that distract.
        kind: As in `Example`.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    needed: tuple[Passage, ...]
    others: tuple[Passage, ...] = ()
    kind: str = ""


def ask(rng: np.random.Generator, inquiry: Inquiry, others: Sequence[Passage]) -> Example:
    """Return the example that asks about the needed passages among others, in random order.

    Documents are not numbered: what one says, and what is stored of it, does not depend on its place.
    """
    passages = [*inquiry.needed, *others]
    shuffled = [passages[i] for i in rng.permutation(len(passages)).tolist()]
    opening = f"{INSTRUCTION}The following are given documents.\n\n"
    documents = (opening, *(f"Document: {passage.title}\n{passage.text}\n\n" for passage in shuffled))
    return Example(
        id=inquiry.id,
        context="".join(documents),
        question=f"{INSTRUCTION}Question: {inquiry.question}",
        answers=inquiry.answers,
        max_new_tokens=32,
        answer_prefix=" Answer:",
        kind=inquiry.kind,
        documents=documents,
    )
