"""Questions about a context that is in a cache: each asks a fork, alone or in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from redknot_hf.cache.argument import OF_GENERATE
from redknot_hf.cache.cache import RedKnotCache, row_layers
from redknot_hf.text.seams import Seams

from .assemble import AssembledCache, prompt
from .ids import left_padded


def ask(
    model: Any, cache: RedKnotCache, questions: str | Sequence[str], tokenizer: Any, *, batch_size: int = 1,
    **options: Any,
) -> Any:  # fmt: skip
    """Answers questions about an assembled context: `ask(model, cache, "Who?", tokenizer, max_new_tokens=20)`.

    Each question goes to a fork, so that none sees another or its answer, and the cache stays as it was.

    Args:
        model: The one the cache was assembled with.
        cache: Of one sequence, which every question is about; or of several, with a question for each.
        questions: One, or a list.
        tokenizer: The model's, or the `Seams` that the context was made with.
        batch_size: Questions about one sequence that are answered together.
        options: Of `generate`.

    Returns:
        The answer as text; a list of them for a list of questions.

    Raises:
        TypeError: The cache was not assembled, so nobody knows the tokens of its context.
        ValueError: A question is no text, there is not one for each sequence, or an option asks for more than text.
    """
    if not isinstance(cache, AssembledCache):
        raise TypeError(
            f"ask takes a cache of assemble, and got a {type(cache).__name__}: give it to generate instead"
        )
    seams, alone = Seams.of(tokenizer), isinstance(questions, str)
    suffixes = seams.questions(questions)
    if len(cache.reused) == 1:
        context = torch.tensor([[i for part in cache.reused[0] for i in part.ref.ids]])
        found = list(answers(model, cache, context, suffixes, batch_size, **options))
    else:
        made = prompt(cache, suffixes)
        found = generated(model, made, **options)
    said = [seams.answer(ids) for ids in found]
    return said[0] if alone else said


def answers(
    model: Any,
    cache: RedKnotCache,
    context: Int[Tensor, "1 tokens"],
    suffixes: Sequence[Sequence[int]],
    batch_size: int = 1,
    **options: Any,
) -> Iterator[list[int]]:
    """The tokens that answer each suffix of one context; forks are asked, so the cache stays as it is.

    Args:
        model: What generates.
        cache: Holds the context.
        context: Its tokens.
        suffixes: Token ids of what follows, question by question.
        batch_size: Suffixes that are answered together, padded on the left.
        options: Of `generate`.

    Raises:
        ValueError: The batch is of no question, or an option asks for more than one text a question.
    """
    if batch_size < 1:
        raise ValueError(
            f"batch_size={batch_size}: give the number of questions that are answered together, 1 or more"
        )
    device = next(layer.device for _, layer in row_layers(cache))
    for start in range(0, len(suffixes), batch_size):
        asked = suffixes[start : start + batch_size]
        fork = cache.fork()
        if len(asked) > 1:
            fork.batch_repeat_interleave(len(asked))
        ids, real = left_padded(asked)
        read = context.expand(len(asked), -1).to(ids)
        made = {
            "input_ids": torch.cat([read, ids], 1).to(device),
            "attention_mask": torch.cat([torch.ones_like(read), real], 1).to(device),
        }
        yield from generated(model, made | {OF_GENERATE: fork}, **options)


def generated(model: Any, made: dict[str, Any], **options: Any) -> list[list[int]]:
    """What `generate` makes of a prompt, without the prompt: the ids of a text for each row.

    Raises:
        ValueError: An option asks for more than one text a row, or for more than text.
    """
    refused = {"num_return_sequences": 1, "return_dict_in_generate": False}
    for name, only in refused.items():
        if options.get(name) not in (None, only):
            raise ValueError(f"{name}={options[name]}: an answer is one text; call generate(**prompt(...)) for more")
    end = model.generation_config.eos_token_id
    if model.generation_config.pad_token_id is None and end is not None:
        options = {"pad_token_id": end[0] if isinstance(end, list) else end} | options
    out = model.generate(**made, **options)
    return out[:, made["input_ids"].shape[1] :].tolist()
