"""The owner of a layer's tokens: which tokens of a step go together, that a step is written once, other rules."""

import numpy as np
import pytest
import torch
from families import make_model
from redknot_kernels import UNBOUNDED, HeadRules, gather_tokens, implementation, scatter_tokens

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache
from redknot_hf.cache.storage import Storage

OPTIONS = {"scale": 0.25, "softcap": None, "s_aux": None}
PAGE = 16


@pytest.fixture
def cache():
    config = make_model("llama", num_hidden_layers=1).config
    return RedKnotCache(config, HeadPlan([(HeadSpec(), HeadSpec(7, 2), HeadSpec(7, 2), HeadSpec())]), page_size=PAGE)


def step_of(cache, tokens, batch=2):
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(batch, 4, tokens, 16, generator=generator) for _ in range(2))
    return cache.update(keys, values, 0)[0].redknot


def groups(step, real):
    return step.storage.groups(step, real)


def append(step, real):
    step.storage.append(step, real)


def padded(tokens, *padding):
    """Flags of sequences that begin with so much padding."""
    return torch.arange(tokens) >= torch.tensor(padding)[:, None]


def test_equal_rows_are_attended_together(cache):
    for tokens in (40, 3, 40):
        step = step_of(cache, tokens)
        (group,) = step.storage.groups(step, None)
        assert group.sequences == slice(0, 2)
        assert group.real is None
        append(step, None)


def test_padding_and_rows_of_different_length_are_attended_one_by_one(cache):
    real = padded(40, 0, 5)
    step = step_of(cache, 40)
    first, second = step.storage.groups(step, real)
    assert (first.sequences, second.sequences) == (slice(0, 1), slice(1, 2))
    assert first.real.tolist() == list(range(40))
    assert second.real.tolist() == list(range(5, 40))
    append(step, real)
    assert [group.sequences for group in groups(step_of(cache, 40), None)] == [slice(0, 1), slice(1, 2)]
    assert len(groups(step_of(cache, PAGE), None)) == 1  # a short step is read back from the rows


def test_a_sequence_of_padding_alone_has_no_run(cache):
    assert [group.sequences for group in groups(step_of(cache, 40), padded(40, 40, 0))] == [slice(1, 2)]


def test_long_steps_keep_the_past_as_it_was(cache):
    append(step_of(cache, 40), None)
    step = step_of(cache, 20)
    append(step, None)
    (group,) = step.groups
    assert group.context.length == 40
    (band,) = group.context.bands
    assert [x.shape for x in band] == [(2, 2, 2 + 6, 16)] * 2  # sinks, and a window less the query itself


def test_a_step_is_written_once(cache):
    layer = cache.layers[0]
    step = step_of(cache, 40)
    append(step, None)
    before = layer.storage.pool.pages.keys.clone()
    append(step, None)
    assert step.written
    assert layer.get_seq_length() == 40
    assert torch.equal(layer.storage.pool.pages.keys, before)


@pytest.mark.parametrize("real", [None, padded(5, 0, 2)], ids=["whole", "padded"])
def test_short_steps_are_written_and_attended_in_one_go(cache, real):
    step = step_of(cache, 5)
    query = torch.randn(2, 8, 5, 16)
    out = step.storage.attend(step, query, real, OPTIONS)
    assert out.shape == (2, 5, 8, 16)
    assert step.written
    assert cache.layers[0].storage.rows.lengths.tolist() == ([5, 5] if real is None else [5, 3])
    assert out[0].isfinite().all()


WINDOWS, SINKS = (UNBOUNDED, 5, 9), (0, 2, 0)
CPU = torch.device("cpu")


def numbered(rules, length):
    """A storage whose keys and values say at which position they stand, and what its rows hold."""
    storage = Storage(1, rules, (1, 1), torch.float32, CPU, implementation("torch"), None)
    storage.reserve(np.array([length]))
    storage.rows.advance(np.array([length]))
    held = [storage.rows.positions_held(0, h) for h in range(rules.heads)]
    for h, positions in enumerate(held):
        where = torch.from_numpy(positions)[None, None]
        new = where[..., None].float()
        scatter_tokens(storage.pool.pages, row(storage, h), rules.take((h,)).slots(where), new, new)
    return storage, held


def row(storage, head):
    return torch.from_numpy(np.maximum(storage.rows.table[:, head : head + 1], 0))


def check(storage, held):
    """Rows hold these positions, each where their rules say."""
    rules = storage.rows.rules
    for h, positions in enumerate(held):
        where = torch.from_numpy(positions)[None, None]
        found, _ = gather_tokens(storage.pool.pages, row(storage, h), rules.take((h,)).slots(where))
        assert found.flatten().tolist() == positions.tolist()
        assert storage.rows.positions_held(0, h).tolist() == positions.tolist()


@pytest.mark.parametrize("length", [6, 20, 40, 100])
def test_every_row_holds_under_wider_rules_what_it_held(length):
    narrow, wide = (HeadRules.make(WINDOWS, SINKS, page_size=8, slack=slack) for slack in (0, 64))
    storage, held = numbered(narrow, length)
    storage.change_rules(wide)
    check(storage, held)
    assert (storage.pool.references.counts == storage.pool.refs()).all()


@pytest.mark.parametrize("length", [6, 20, 40, 100])
@pytest.mark.parametrize("forked", [False, True])
def test_narrower_rules_keep_what_they_say_and_free_the_rest(length, forked):
    dense, narrow = (HeadRules.make(windows, SINKS, page_size=8) for windows in ((UNBOUNDED,) * 3, WINDOWS))
    storage, held = numbered(dense, length)
    fork = storage.fork() if forked else None
    before = storage.nbytes
    storage.change_rules(narrow)
    kept = [p[(p < s) | (p >= length - r)] for p, s, r in zip(held, narrow.sink, narrow.ring, strict=True)]
    check(storage, kept)
    if fork is None:
        made, _ = numbered(narrow, length)
        assert storage.nbytes <= min(before, made.nbytes + 8 * 2 * 4)
    else:
        check(fork, held)
