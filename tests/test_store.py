import gc
import os
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import VOCABULARY, make_model
from oracle import random_plan

from redknot_hf import HeadPlan, HeadSpec, SegmentStore

SEED = 0


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=2, max_position_embeddings=16384)


@pytest.fixture(scope="module")
def plan(model):
    return random_plan(model.config)


def test_a_text_is_prefilled_once(model, plan):
    store = SegmentStore(model, plan)
    first = store.add(text(30), [1])
    same = store.add_all([torch.tensor(text(30)), text(30), text(20)], (1,))
    assert [ref == first for ref in same] == [True, True, False]
    assert store.counts.computed == 2
    assert first in store
    assert store.ref(text(30)) not in store  # behind no prefix it is another
    assert store.get(first).ids == tuple(text(30))
    behind = store.add(text(8), first)
    assert behind.prefix == (1, *text(30))
    for wrong in ([], torch.zeros(1, 3)):
        with pytest.raises(ValueError, match="text"):
            store.add(wrong)


def test_a_batch_equals_texts_alone(model, plan):
    texts = [text(n, n) for n in (50, 7, 200, 51)]
    together, alone = SegmentStore(model, plan), SegmentStore(model, plan)
    for a, b in zip(together.add_all(texts, [3]), [alone.add(one, [3]) for one in texts], strict=True):
        torch.testing.assert_close(together.get(a).data, alone.get(b).data, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "most", [{"device_bytes": 20_000, "host_bytes": 40_000}, {"device_bytes": 0, "host_bytes": 0}]
)
def test_more_segments_than_memory_holds(model, plan, most):
    """What is in no file and was pushed out is computed anew, and is the same."""
    store = SegmentStore(model, plan, **most)
    refs = store.add_all([text(40, seed) for seed in range(12)])
    want = [SegmentStore(model, plan).get(ref).data for ref in refs]
    for _ in range(2):
        for ref, data in zip(refs, want, strict=True):
            assert torch.equal(store.get(ref).data, data) or torch.allclose(store.get(ref).data, data, atol=1e-5)
            assert all(store.nbytes[tier] <= most[f"{tier}_bytes"] for tier in store.nbytes)
    assert store.counts.recomputed > 0


def test_another_process_reads_the_files(model, plan, tmp_path):
    writer = SegmentStore(model, plan, path=tmp_path)
    refs = writer.add_all([text(40, seed) for seed in range(3)], [9])
    reader = SegmentStore(make_model("llama", num_hidden_layers=2, max_position_embeddings=16384), plan, path=tmp_path)
    for ref in refs:
        assert reader.add(ref.ids, ref.prefix) == ref
        assert torch.equal(reader.get(reader.ref(ref.ids, ref.prefix)).data, writer.get(ref).data)
    assert reader.counts.computed == reader.counts.recomputed == 0
    assert reader.counts.hits["disk"] == 3
    assert all(held.here().ids == ref.ids for held, ref in zip(reader.fetch(refs), refs, strict=True))
    reader.drop(refs[0])
    assert refs[0] not in reader
    assert len([*tmp_path.iterdir()]) == 2


def test_a_text_that_is_named_twice_is_fetched_once(model, plan):
    for host_bytes in (None, 0):  # on the host, and lost
        store = SegmentStore(model, plan, device_bytes=0, host_bytes=host_bytes)
        ref, other = store.add_all([text(30), text(20)])
        first, _, same = store.fetch([ref, other, ref])
        assert first is same
        assert store.counts.hits["host"] + store.counts.recomputed == 2


def test_other_models_and_plans_do_not_meet(model, plan, tmp_path):
    mine = SegmentStore(model, plan, path=tmp_path)
    mine.add(text(20))
    others = [
        SegmentStore(make_model("llama", num_hidden_layers=2, seed=1), plan, path=tmp_path),
        SegmentStore(model, HeadPlan.uniform(model.config, HeadSpec(9, 9)), path=tmp_path),
        SegmentStore(model, plan, path=tmp_path, keep="full"),
    ]
    for other in others:
        assert other.ref(text(20)) not in other


def break_file(path):
    path.write_bytes(path.read_bytes()[:-9])


def foreign_file(path):
    path.write_bytes(b"{}")


@pytest.mark.parametrize("harm", [break_file, foreign_file, os.remove])
def test_a_bad_file_is_replaced_by_what_it_should_hold(model, plan, tmp_path, harm):
    store = SegmentStore(model, plan, device_bytes=0, host_bytes=0, path=tmp_path)
    ref = store.add(text(33))
    good = store.get(ref).data
    (path,) = tmp_path.iterdir()
    harm(path)
    if harm is os.remove:
        assert torch.equal(store.get(ref).data, good)
    else:
        with pytest.warns(RuntimeWarning, match="computed anew"):
            assert torch.equal(store.fetch([ref])[0].here().data, good)
        assert store.counts.damaged == 1
    assert store.counts.recomputed == 1
    assert torch.equal(store.get(ref).data, good)
    assert store.counts.hits["disk"] == 2


def test_a_full_disk_keeps_segments_in_memory(model, plan, tmp_path, monkeypatch):
    store = SegmentStore(model, plan, path=tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="kept in memory only.*No space left"):
        ref = store.add(text(12))
    assert store.counts.failed_writes == 1
    assert store.get(ref).ids == tuple(text(12))
    assert not any(tmp_path.iterdir())


def test_threads_compute_a_text_once_and_agree(model, plan, tmp_path):
    store = SegmentStore(model, plan, device_bytes=30_000, host_bytes=30_000, path=tmp_path)
    texts = [text(25, seed) for seed in range(10)]
    order = torch.randint(10, (60,), generator=torch.Generator().manual_seed(SEED)).tolist()

    def use(i):
        segment = store.get(store.add(texts[i]))
        assert segment.ids == tuple(texts[i])
        return i, segment.data

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(use, order))
    assert store.counts.computed == len(set(order))
    assert store.counts.recomputed == 0
    first = dict(found)
    assert all(torch.equal(first[i], data) for i, data in found)


def test_a_model_that_changes_is_noticed(plan):
    model = make_model("llama", num_hidden_layers=2)
    store = SegmentStore(model, plan)
    ref = store.add(text(5))
    with torch.no_grad():
        model.lm_head.weight += 0  # touched, and the same
    assert store.add(text(5)) == ref
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="weights"):
        store.add(text(6))


def test_bytes_in_memory_and_on_disk_follow_the_plan(tmp_path):
    """1/8 of the heads global, windows of 256: at most 0.16 of the dense cache for 8K tokens."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    model = make_model("llama", max_position_embeddings=16384, **shape)
    plan = HeadPlan.with_global(model.config, [(0, 3), (1, 0)], local=HeadSpec(256, 4))
    store = SegmentStore(model, plan, path=tmp_path)
    ref = store.add(text(8192))
    segment = store.get(ref)
    dense = 8192 * 2 * 8 * 2 * 16 * 4
    assert segment.dense_nbytes == dense
    assert store.nbytes["device"] == segment.nbytes <= 0.16 * dense
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size <= 0.16 * dense


def test_a_store_lets_go_of_all_it_held(model, plan, tmp_path):
    store = SegmentStore(model, plan, path=tmp_path)
    ref = store.add(text(40))
    data = weakref.ref(store.get(ref).data)
    assert "1 text" in repr(store)
    gone = weakref.ref(store)
    del store, ref
    gc.collect()
    assert gone() is None
    assert data() is None


def test_wrong_arguments_are_refused(model, plan):
    with pytest.raises(ValueError, match="keep='half'"):
        SegmentStore(model, plan, keep="half")
    with pytest.raises(ValueError, match="layers x"):
        SegmentStore(model, HeadPlan([[HeadSpec()]]))
    assert SegmentStore(model, plan, identity="mine").identity == "mine"
    assert Counter(SegmentStore(model, plan).nbytes) == Counter()


def test_a_store_says_what_lies_in_its_folder(model, plan, tmp_path):
    store = SegmentStore(model, plan, path=tmp_path)
    assert f"0 files of 0.0 MiB in {tmp_path}" in repr(store)
    store.add(text(40))
    store.add(text(30, 1))
    again = SegmentStore(model, plan, path=tmp_path)  # as another process finds it
    assert "0 texts in memory" in repr(again)
    assert "2 files of" in repr(again)
    found = again.stored()
    assert {(entry.tier, entry.nbytes) for entry in found} == {("disk", p.stat().st_size) for p in tmp_path.iterdir()}
    again.drop(found[0].address)
    assert [entry.address for entry in again.stored()] == [found[1].address]
    assert store.stored() == again.stored()
