"""Random texts, and what a model says of them."""

import torch
from families import VOCABULARY
from oracle import masked_logits

from redknot_hf import cache_argument
from redknot_hf.profiling import Prompt

LONG = {"max_position_embeddings": 2048}
BOS = [3, 4]
LENGTHS = (150, 70, 5, 1)  # longer than every window, than most, than some sinks, a single token


def prompts(batch, length, padding=()):
    """Random ids, and a mask with this many slots of left padding a row."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


def profiling_prompts(length=40, count=2, vocabulary=97):
    generator = torch.Generator().manual_seed(1)
    return [Prompt(torch.randint(1, vocabulary, (length,), generator=generator)) for _ in range(count)]


def some_ids(batch, length, seed=1):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def texts(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


QUESTION = texts((9,), seed=99)[0]


def joined(parts):
    return [token for part in parts for token in part]


def next_logits(model, cache, ids=QUESTION):
    with torch.no_grad():
        return model(torch.tensor([ids]), **cache_argument(model, cache)).logits


def dense(model, plan, context, ids=QUESTION):
    return masked_logits(model, plan, torch.tensor([[*context, *ids]]))[:, -len(ids) :]
