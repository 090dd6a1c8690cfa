"""Segments are cut into passes of bounded size, and every token of a boundary is in just one of them."""

import pytest
import torch
from families import make_model

from redknot_hf import HeadPlan, HeadSpec, SegmentStore
from redknot_hf.reuse import schedule
from redknot_hf.reuse.schedule import Reused, passes


@pytest.fixture(scope="module")
def store():
    model = make_model("llama", num_hidden_layers=4)
    return SegmentStore(model, HeadPlan.uniform(model.config, HeadSpec()))


@pytest.fixture
def sequence(store):
    """Two segments, the second one twice: all of the first are recomputed, one token, and none."""
    a, b = store.ref([1, 2, 3, 4, 5]), store.ref([6, 7, 8])
    return [Reused(a, 4, 5, True), Reused(b, 9, 1, True), Reused(b, 12, 0, True)]


def told(found):
    return [[[(p.part.start, p.places.tolist(), p.rest, p.end) for p in some] for some in batch] for batch in found]


def test_one_pass_takes_everything_that_fits(store, sequence):
    all_three = [(4, [4, 5, 6, 7, 8], False, 9), (9, [9], True, 12), (12, [], True, 15)]
    assert told(passes([sequence], store)) == [[all_three]]
    assert told(passes([sequence, sequence[:1]], store)) == [[all_three, all_three[:1]]]


def test_long_boundaries_are_cut(store, sequence, monkeypatch):
    monkeypatch.setattr(schedule, "_PASS_TOKENS", 6)
    assert told(passes([sequence, []], store)) == [
        [[(4, [4, 5, 6], False, 7)], []],
        [[(4, [7, 8], False, 9), (9, [9], True, 12), (12, [], True, 15)], []],
    ]


def test_stored_bytes_are_bounded(store, sequence, monkeypatch):
    monkeypatch.setattr(schedule, "_PASS_BYTES", 1)
    assert [[len(some) for some in batch] for batch in passes([sequence], store)] == [[1], [1], [1]]


@pytest.mark.parametrize(
    ("keep", "storage", "tokens", "sizes"),
    [
        ("plan", "model", 8, [[2]]),
        ("full", "model", 8, [[1], [1]]),
        ("full", "model", 256, [[1], [1]]),
        ("full", "int8", 256, [[2]]),
    ],
)
def test_what_a_store_keeps_counts(store, keep, storage, tokens, sizes, monkeypatch):
    """4 layers of 4 heads: 2 KiB a token, of a window of 1 that many in all, in 8 bits some 0.7 KiB."""
    plan = HeadPlan.uniform(store.model.config, HeadSpec(1))
    other = SegmentStore(store.model, plan, keep=keep, storage=storage)
    texts = [other.ref([i] * tokens) for i in (1, 2)]
    sequence = [Reused(text, tokens * i, 0, True) for i, text in enumerate(texts)]
    monkeypatch.setattr(schedule, "_PASS_BYTES", 2500 * tokens)
    assert [[len(some) for some in batch] for batch in passes([sequence], other)] == sizes


def test_a_pass_may_bring_more_where_more_is_free(monkeypatch):
    """A quarter of what is free on a GPU, with what PyTorch holds unused; a GiB at least."""
    gpu = torch.device("cuda")
    for name, gib in (("memory_reserved", 30), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, gib=gib: gib * 2**30)
    for free, room in ((30, 10), (2, 3), (-8, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * 2**30, 0))
        assert schedule._room(gpu) == room * 2**30
    assert schedule._room(torch.device("cpu")) == 2**30
