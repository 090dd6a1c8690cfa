"""Which tokens of a step are attended together, and that a step is written once."""

import pytest
import torch
from families import make_model

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache
from redknot_hf.cache.commit import runs, write, write_and_attend

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


def padded(tokens, *padding):
    """Flags of sequences that begin with so much padding."""
    return torch.arange(tokens) >= torch.tensor(padding)[:, None]


def test_equal_rows_are_attended_together(cache):
    for tokens in (40, 3, 40):
        step = step_of(cache, tokens)
        (run,) = runs(step, None)
        assert run.sequences == slice(0, 2)
        assert run.real is None
        write(step, None)


def test_padding_and_rows_of_different_length_are_attended_one_by_one(cache):
    real = padded(40, 0, 5)
    step = step_of(cache, 40)
    first, second = runs(step, real)
    assert (first.sequences, second.sequences) == (slice(0, 1), slice(1, 2))
    assert first.real.tolist() == list(range(40))
    assert second.real.tolist() == list(range(5, 40))
    write(step, real)
    assert [run.sequences for run in runs(step_of(cache, 40), None)] == [slice(0, 1), slice(1, 2)]
    assert len(runs(step_of(cache, PAGE), None)) == 1  # a short step is read back from the rows


def test_a_sequence_of_padding_alone_has_no_run(cache):
    assert [run.sequences for run in runs(step_of(cache, 40), padded(40, 40, 0))] == [slice(1, 2)]


def test_long_steps_keep_the_past_as_it_was(cache):
    write(step_of(cache, 40), None)
    step = step_of(cache, 20)
    write(step, None)
    (run,) = step.runs
    assert run.context.length == 40
    (band,) = run.context.bands
    assert [x.shape for x in band] == [(2, 2, 2 + 6, 16)] * 2  # sinks, and a window less the query itself


def test_a_step_is_written_once(cache):
    layer = cache.layers[0]
    step = step_of(cache, 40)
    write(step, None)
    before = layer.pool.pages.keys.clone()
    write(step, None)
    assert step.written
    assert layer.slots == 40
    assert torch.equal(layer.pool.pages.keys, before)


@pytest.mark.parametrize("real", [None, padded(5, 0, 2)], ids=["whole", "padded"])
def test_short_steps_are_written_and_attended_in_one_go(cache, real):
    step = step_of(cache, 5)
    query = torch.randn(2, 8, 5, 16)
    out = write_and_attend(query, step, real, OPTIONS)
    assert out.shape == (2, 5, 8, 16)
    assert step.written
    assert cache.layers[0].rows.lengths.tolist() == ([5, 5] if real is None else [5, 3])
    assert out[0].isfinite().all()
