"""Examples in a model's tokens, in groups that are read together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from evals.answering import Question
from evals.identity import digest
from evals.measuring import Asked
from evals.method import Context
from evals.task import Example
from redknot_hf.text.chat import ChatTemplate


@dataclass(frozen=True)
class Group:
    """Examples whose contexts are read together.

    Attributes:
        examples: Those of one context follow each other.
        asked: The same in tokens.
        contexts: For each example a hash of its context; examples of one context are no independent witnesses.
    """

    examples: tuple[Example, ...]
    asked: Asked
    contexts: tuple[str, ...]

    def only(self, chosen: set[str]) -> Group:
        """Return the group with these examples, by id, and the contexts they need."""
        places = [i for i, example in enumerate(self.examples) if example.id in chosen]
        rows = sorted({self.asked.rows[i] for i in places})
        context = self.asked.context
        kept = Context(tuple(context.rows[r] for r in rows), tuple(context.documents[r] for r in rows), context.room)
        asked = Asked(
            kept,
            tuple(self.asked.questions[i] for i in places),
            tuple(rows.index(self.asked.rows[i]) for i in places),
        )
        examples = tuple(self.examples[i] for i in places)
        return Group(examples, asked, tuple(self.contexts[i] for i in places))


class Reader:
    """Turns examples into tokens, and tokens into answers.

    Args:
        tokenizer: The model's.
        end: Tokens that end a text by themselves.
        chat: What stands around context and question; `None` leaves them as they are.
    """

    def __init__(self, tokenizer: Any, end: Iterable[int], chat: ChatTemplate | None = None) -> None:
        self.tokenizer = tokenizer
        self.end = frozenset(end)
        self.chat = chat

    @property
    def overhead(self) -> int:
        """Tokens of a prompt that are not the task's."""
        return 0 if self.chat is None else self.chat.tokens(self.tokenizer)

    def groups(self, examples: Iterable[Example], batch_size: int) -> Iterator[Group]:
        """Yield examples in groups: as many contexts as give `batch_size` questions, one at least."""
        held: list[list[Example]] = []
        for _, same in groupby(examples, key=lambda example: example.context):
            held.append(list(same))
            if sum(map(len, held)) >= batch_size:
                yield self._group(held)
                held = []
        if held:
            yield self._group(held)

    def text(self, ids: list[int], stop: str | None) -> str:
        """Return what an answer says, without what ended it."""
        said = self.tokenizer.decode([i for i in ids if i not in self.end], skip_special_tokens=True).lstrip("\n")
        return (said.split(stop)[0] if stop else said).strip()

    def done(self, stop: str | None) -> Callable[[list[int]], bool]:
        """Return a test of whether an answer has ended."""

        def ended(ids: list[int]) -> bool:
            return ids[-1] in self.end or (stop is not None and stop in self.tokenizer.decode(ids).lstrip("\n"))

        return ended

    def _group(self, by_context: list[list[Example]]) -> Group:
        examples = [example for same in by_context for example in same]
        documents = [self._documents(same[0]) for same in by_context]
        questions = [self._question(example) for example in examples]
        context = Context(
            tuple(torch.cat(parts) for parts in documents),
            tuple(parts if same[0].documents else () for parts, same in zip(documents, by_context, strict=True)),
            max(len(question.ids) + question.max_new_tokens for question in questions),
        )
        rows = tuple(row for row, same in enumerate(by_context) for _ in same)
        keys = [digest(same[0].context) for same in by_context]
        return Group(tuple(examples), Asked(context, tuple(questions), rows), tuple(keys[row] for row in rows))

    def _documents(self, example: Example) -> tuple[Tensor, ...]:
        """The context's parts, tokenized apart, so that all methods read the same tokens."""
        first, *others = example.documents or (example.context,)
        begins = self.chat is None  # a template writes what begins a text itself
        if self.chat is not None:
            first = self.chat.opening + first
        tokens = (self._ids(part, begins and i == 0) for i, part in enumerate((first, *others)))
        return tuple(ids for ids in tokens if len(ids))

    def _question(self, example: Example) -> Question:
        closing = "" if self.chat is None else self.chat.closing
        ids = self._ids(example.question + closing + example.answer_prefix, add_special_tokens=False)
        if not len(ids):
            raise ValueError(f"example {example.id} asks nothing: give it a question or an answer prefix")
        given = self._ids(example.answers[0], add_special_tokens=False).tolist() if example.given else ()
        return Question(ids, example.max_new_tokens, self.done(example.stop), tuple(given))

    def _ids(self, text: str, add_special_tokens: bool) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"], dtype=torch.long)


def end_tokens(model: Any) -> tuple[int, ...]:
    """Return the tokens at which a model's generation ends."""
    end = model.generation_config.eos_token_id
    if end is None:
        return ()
    return tuple(end) if isinstance(end, (list, tuple)) else (int(end),)
