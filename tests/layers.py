"""Caches that have read something, and rows without a cache."""

import numpy as np
import torch
from families import make_model
from oracle import random_plan
from redknot_kernels import UNBOUNDED, HeadRules
from texts import some_ids

from redknot_hf import RedKnotCache, cache_argument
from redknot_hf.cache.rows import Rows

PAGE = 16


@torch.no_grad()
def feed(model, cache, ids):
    return model(ids, **cache_argument(model, cache)).logits


def planned(batch=1, length=0, seed=0, **kwargs):
    """A Llama, a random plan, a cache, and the ids it has read."""
    model = make_model("llama")
    cache = RedKnotCache(model.config, random_plan(model.config, seed), page_size=PAGE, **kwargs)
    ids = some_ids(batch, length)
    if length:
        feed(model, cache, ids)
    return model, cache, ids


def held(cache):
    """What every row of every layer holds: positions, keys and values."""
    found = {}
    for i, storage in enumerate(cache._storages()):
        for b, h in np.ndindex(storage.rows.batch, storage.rows.rules.heads):
            at = storage.rows.positions_held(b, h)
            found[i, b, h] = at, *(x.clone() for x in storage.read(b, np.full(len(at), h), at))
    return found


class Shelf:
    """Hands out new page ids."""

    def __init__(self):
        self.taken = 0

    def __call__(self, count):
        self.taken += count
        return np.arange(self.taken - count, self.taken)


def make_rows(batch=2):
    """Heads: global; window 20, sink 3; window 1. Pages of 8: at most 4 and 2 of them in the local rows."""
    return Rows(batch, HeadRules.make((UNBOUNDED, 20, 1), (0, 3, 0), page_size=8)), Shelf()


def grow(rows, shelf, lengths):
    lengths = np.array(lengths)
    rows.reserve(lengths, shelf)
    rows.advance(lengths - rows.lengths)
