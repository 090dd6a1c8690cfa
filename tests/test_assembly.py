"""One pass of many segments is held against passes of one; test_assemble.py holds both against dense attention."""

import gc
import weakref

import numpy as np
import pytest
import torch
from families import make_model
from oracle import random_plan
from texts import BOS, LONG, joined, next_logits, texts

from redknot_hf import AssembledCache, HeadPlan, HeadSpec, RedKnotCache, SegmentStore, assemble
from redknot_hf.cache.cache import row_layers
from redknot_hf.reuse import assembly, schedule
from redknot_hf.reuse.recording import forward


def chunk_by_chunk(model, refs, boundary) -> AssembledCache:
    """The same cache by many passes, one for every chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_PASS_BYTES", 1)
        return assemble(model, refs, boundary=boundary)


@pytest.mark.pairs
@pytest.mark.parametrize("most", [40, 16])
@pytest.mark.parametrize("boundary", [1, 20, 0.5, [2, 0, 70, "all", 1]])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n", "gpt_oss", "mistral_sliding", "gemma4"])
def test_one_pass_does_what_many_do(family, boundary, most, monkeypatch):
    model = make_model(family, **LONG)
    store = SegmentStore(model, random_plan(model.config, seed=2))
    lead, *documents = [store.add(BOS), *store.add_all(texts(), BOS)]
    order = [lead, documents[1], documents[0], documents[2], documents[0]]
    sizes = []
    run = assembly.Assembly.run
    monkeypatch.setattr(assembly.Assembly, "run", lambda self: (sizes.append(len(self.batch[0])), run(self)))
    cache = assemble(model, order, boundary=boundary)
    assert sizes == [5]
    many = chunk_by_chunk(model, order, boundary)
    assert len(sizes) >= 6
    assert set(sizes[1:]) == {1}
    assert cache.nbytes == many.nbytes
    want = next_logits(model, many)
    torch.testing.assert_close(next_logits(model, cache), want, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(schedule, "_PASS_TOKENS", most)
    other = assemble(model, order, boundary=boundary)
    torch.testing.assert_close(next_logits(model, other), want, atol=1e-4, rtol=1e-4)


def test_the_model_is_walked_as_often_however_many_layers_it_has(monkeypatch):
    """A walk for each layer would take time by the square of their number."""
    walks = []
    for layers in (2, 6):
        model = make_model("llama", num_hidden_layers=layers)
        refs = SegmentStore(model, random_plan(model.config, seed=2)).add_all(texts())
        with monkeypatch.context() as patch:
            walk, seen = type(model).modules, []
            patch.setattr(type(model), "modules", lambda self: (seen.append(1), walk(self))[1])  # noqa: B023
            assemble(model, refs, boundary=0)
        walks.append(len(seen))
    assert walks[0] == walks[1]


@pytest.mark.parametrize("boundary", [0, 0.5])
def test_a_question_finds_room_behind_the_segments(boundary):
    model = make_model("llama", **LONG)
    store = SegmentStore(model, random_plan(model.config, seed=2))
    cache = assemble(model, [store.add(BOS), *store.add_all(texts(), BOS)], boundary=boundary)
    pools = [layer.storage.pool.pages for _, layer in row_layers(cache)]
    forward(model, cache, [[1] * assembly.ROOM])
    assert all(layer.storage.pool.pages is pages for (_, layer), pages in zip(row_layers(cache), pools, strict=True))


def test_layers_that_share_keys_attend_each_chunk_as_it_was():
    model = make_model("gemma3n", **LONG)
    plan = HeadPlan([[HeadSpec(), HeadSpec(3, 2), HeadSpec(40, 0), HeadSpec(1, 5)]] * 4)
    store = SegmentStore(model, plan, identity="tiny")
    documents = texts((150, 20, 5))
    refs = [store.ref(text) for text in (BOS, *documents)]
    cache = assemble(model, refs, boundary="all")
    whole = RedKnotCache(model.config, plan)
    forward(model, whole, [[*BOS, *joined(documents)]])
    found, wanted = (next_logits(model, x) for x in (cache, whole))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_sequences_of_a_batch_go_on_by_boundaries_of_different_length():
    model = make_model("llama", **LONG)
    store = SegmentStore(model, random_plan(model.config))
    refs = [store.add(BOS), *store.add_all(texts(), BOS)]
    batch = [[refs[1], refs[0], refs[4]], [refs[2]], [refs[3], refs[3], refs[1], refs[2]]]
    boundary = lambda ref, start: (start + len(ref)) % 9  # noqa: E731
    cache = assemble(model, batch, boundary=boundary)
    for b, refs in enumerate(batch):
        alone = chunk_by_chunk(model, refs, boundary)
        for (_, layer), (_, wanted) in zip(row_layers(cache), row_layers(alone), strict=True):
            rows = layer.storage.rows
            for head in range(4):
                held = wanted.storage.rows.positions_held(0, head)
                assert set(held.tolist()) <= set(rows.positions_held(b, head).tolist())
                index = np.full(len(held), head)
                mine, theirs = layer.storage.read(b, index, held), wanted.storage.read(0, index, held)
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_only_one_layer_is_laid_out_at_a_time(monkeypatch):
    model = make_model("llama", **LONG)
    store = SegmentStore(model, random_plan(model.config))
    refs = [store.add(BOS), *store.add_all(texts(), BOS)]
    store.verdict()
    lay_out, laid, alive = assembly.Assembly._laid_out, [], []

    def watched(*args):
        alive.append(sum(one() is not None for one in laid))
        text = lay_out(*args)
        laid.append(weakref.ref(text))
        return text

    monkeypatch.setattr(assembly.Assembly, "_laid_out", watched)
    gc.disable()
    try:
        assemble(model, refs[::-1], boundary=4)
    finally:
        gc.enable()
    assert len(alive) == model.config.num_hidden_layers
    assert max(alive) <= 1


def test_a_text_that_was_lost_is_computed_before_the_pass_begins():
    model = make_model("llama", **LONG)
    store = SegmentStore(model, random_plan(model.config), device_bytes=0, host_bytes=0)
    refs = [store.add(BOS), *store.add_all(texts(), BOS)]
    kept = SegmentStore(model, store.plan)
    want = assemble(model, [kept.ref(ref.ids, ref.prefix) for ref in refs[::-1]], boundary=3)
    found = assemble(model, refs[::-1], boundary=3)
    assert store.counts.recomputed == 3  # the two short ones are read whole
    torch.testing.assert_close(next_logits(model, found), next_logits(model, want), atol=1e-4, rtol=1e-4)


def test_a_model_with_a_mask_of_its_own_is_refused():
    model = make_model("llama")
    store = SegmentStore(model, random_plan(model.config))
    refs = [store.add(BOS), *store.add_all(texts((30, 20)), BOS)]
    store.verdict()
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": torch.zeros(1, 1, 4, 4)}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="a mask of its own"):
        assemble(model, refs[::-1], boundary=2)
