"""Segments in fewer bits: what comes back, how many bytes they are in every tier, and what is assembled of them."""

from io import BytesIO

import numpy as np
import pytest
import torch
from families import make_model
from oracle import random_plan
from redknot_kernels import UNBOUNDED, dequantise_page, quantise_page
from safetensors import safe_open
from texts import BOS, LONG, QUESTION, dense, joined, next_logits, texts
from watched import watch

from redknot_hf import HeadPlan, HeadSpec, SegmentStore, assemble, refresh
from redknot_hf.cache.span import KeptLayer
from redknot_hf.reuse.coarse import FIRST, GROUP, Coarse, Shape
from redknot_hf.reuse.encoding import SegmentFileError, decoded, encoded, outline, plain_memory
from redknot_hf.reuse.identity import segment_address
from redknot_hf.reuse.segment import Segment, empty

LAYERS = (
    KeptLayer((UNBOUNDED, 70, 4), (0, 3, 2), 16, 8),
    None,
    KeptLayer((UNBOUNDED,), (0,), 8, 8),
)
# Of keys and values against what they were, in the norm.
NEAR = {"int8": 0.02, "int4": 0.25}


def segment(tokens, prefix=(7,), dtype=torch.float32):
    made = empty("abc", tuple(range(tokens)), prefix, LAYERS, torch.zeros(0, dtype=dtype))
    return made.with_data(torch.randn(made.data.shape, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, FIRST, GROUP + 5, 150])
@pytest.mark.parametrize("prefix", [(), (7,)])
def test_what_comes_back_is_near_and_the_first_tokens_of_a_context_are_exact(tokens, prefix, storage, dtype):
    plain = segment(tokens, prefix, dtype)
    coarse = plain.coarsened(Coarse(storage, dtype))
    assert coarse.data.dtype == torch.uint8
    assert coarse.dtype == plain.dtype
    assert coarse.dense_nbytes == plain.dense_nbytes
    for i in (0, 2):
        heads, _ = LAYERS[i].packed(tokens)
        place = np.concatenate([np.arange(n) for n in np.bincount(heads)])
        for ours, theirs in zip(coarse.pair(i), plain.pair(i), strict=True):
            assert ours.dtype == dtype
            assert ours.shape == theirs.shape
            error = (ours - theirs).float().norm() / theirs.float().norm()
            assert error < NEAR[storage]
            exact = torch.from_numpy(place < FIRST)
            if not prefix:
                assert torch.equal(ours[exact], theirs[exact])
            elif tokens > 1:
                assert not torch.equal(ours[exact], theirs[exact])
    with pytest.raises(ValueError, match="no keys of its own"):
        coarse.keys(1)
    assert storage in repr(coarse)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_groups_are_those_of_cold_pages(storage):
    """Head by head, so many tokens of each together, and the last group as small as it comes."""
    plain, bits = segment(GROUP + 5), {"int8": 8, "int4": 4}[storage]
    keys, values = plain.coarsened(Coarse(storage, torch.float32)).pair(2)
    for part in (slice(GROUP), slice(GROUP, None)):
        x, y = plain.keys(2)[part], plain.values(2)[part]
        wanted = dequantise_page(*quantise_page(x, y, bits), bits, len(x), (8, 8))
        torch.testing.assert_close(keys[part], wanted[0])
        torch.testing.assert_close(values[part], wanted[1])
        for ours, theirs, over in ((keys[part], x, 0), (values[part], y, 1)):
            low, high = theirs.amin(over, keepdim=True), theirs.amax(over, keepdim=True)
            most = 0.5 * (high - low) / (2**bits - 1) + 2**-10 * (low.abs() + high - low)  # half a step, and fp16
            if bits == 8 or over:  # keys of 4 bits are turned, which spreads the error over the channels
                assert ((ours - theirs).abs() <= most).all()


def test_bytes_are_a_half_and_a_quarter():
    layers = (KeptLayer((UNBOUNDED, 256), (0, 4), 128, 128),) * 2
    plain = empty("a", tuple(range(4096)), (1,), layers, torch.zeros(0, dtype=torch.bfloat16))
    for storage, most in (("int8", 0.53), ("int4", 0.28)):
        assert Coarse(storage, torch.bfloat16).nbytes(Shape(layers, 4096, False)) <= most * plain.nbytes
        assert (
            empty("a", plain.ids, (1,), layers, plain.data, Coarse(storage, torch.bfloat16)).nbytes
            <= most * plain.nbytes
        )


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", **LONG, num_hidden_layers=2, head_dim=64)


@pytest.fixture(scope="module")
def global_plan(llama):
    return HeadPlan.uniform(llama.config, HeadSpec())


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_it_is_small_in_every_tier_and_comes_back_from_each(llama, global_plan, storage, tmp_path):
    stores = [SegmentStore(llama, global_plan, storage=s, path=tmp_path / s) for s in ("model", storage)]
    parts = texts((300, 200))
    refs = [store.add_all(parts, BOS) for store in stores]
    share = {"int8": 0.32, "int4": 0.19}[storage]  # of float32: scales of 64 dims weigh
    sizes = [[store.get(ref).nbytes for ref in mine] for store, mine in zip(stores, refs, strict=True)]
    assert sum(sizes[1]) <= share * sum(sizes[0])
    assert stores[1].nbytes["device"] == sum(sizes[1])
    on_disk = [sum(path.stat().st_size for path in (tmp_path / s).iterdir()) for s in ("model", storage)]
    assert on_disk[1] <= share * on_disk[0]
    evicting = SegmentStore(llama, global_plan, storage=storage, device_bytes=0)
    for ref in refs[1]:
        evicting.add(ref.ids, ref.prefix)
        assert torch.equal(evicting.get(ref).data, stores[1].get(ref).data)  # from the host
    assert evicting.nbytes == {"device": 0, "host": sum(sizes[1])}
    reader = SegmentStore(llama, global_plan, storage=storage, path=tmp_path / storage)
    for ref in refs[1]:
        assert torch.equal(reader.get(ref).data, stores[1].get(ref).data)
    assert reader.counts.computed == reader.counts.recomputed == 0


def test_addresses_tell_storages_apart_and_older_ones_stay(llama, global_plan, tmp_path):
    stores = [SegmentStore(llama, global_plan, storage=s, path=tmp_path) for s in ("model", "int8", "int4")]
    (text,) = texts((40,))
    refs = [store.add(text) for store in stores]
    assert len({ref.address for ref in refs}) == 3
    assert all(store.counts.computed == 1 for store in stores)
    # A plan's storage is of the cache that is assembled: what is stored is the same.
    assert SegmentStore(llama, global_plan.stored("int8"), path=tmp_path).ref(text).address == refs[0].address
    plan = HeadPlan([[HeadSpec(), HeadSpec(9, 2)]])
    older = "9f5df0a4d924be3e3c1ac6d5aa1c75b7832983cf1b3e2a2a4cb031ba0f604741"
    assert segment_address("m", plan, "plan", [1, 2], [3]) == older
    assert segment_address("m", plan, "plan", [1, 2], [3], "model") == older
    with safe_open(next(tmp_path.glob(f"{refs[0].address}*")), "pt") as file:  # as it was before there were storages
        assert file.metadata()["format"] == "redknot segment 1"
        assert "storage" not in file.metadata()


def test_bytes_of_another_storage_are_refused_and_their_header_is_bounded():
    made = segment(70)
    coarse = {name: Coarse(name, torch.float32) for name in ("int8", "int4")}
    sent = encoded(made.coarsened(coarse["int8"]), "model")
    assert len(sent) < made.coarsened(coarse["int8"]).nbytes + 2048 < made.nbytes

    def read(sent, storage):
        wanted = outline("abc", made.ids, made.prefix, LAYERS, torch.float32, coarse.get(storage))
        return decoded(BytesIO(sent), len(sent), wanted, "model", "here", plain_memory)

    assert torch.equal(read(sent, "int8").data, made.coarsened(coarse["int8"]).data)
    for other, of in (("int4", "storage"), ("model", "format")):
        with pytest.raises(SegmentFileError, match=f"its {of} is not what is asked for"):
            read(sent, other)
    with pytest.raises(SegmentFileError, match="its format is not"):
        read(encoded(made, "model"), "int8")
    for at in range(len(sent) - 300, len(sent), 7):
        altered = bytearray(sent)
        altered[at] ^= 1
        with pytest.raises(SegmentFileError, match="was altered"):
            read(bytes(altered), "int8")
    size = int.from_bytes(sent[:8], "little")
    long = (size + 4096).to_bytes(8, "little") + sent[8 : 8 + size] + b" " * 4096 + sent[8 + size :]
    with pytest.raises(SegmentFileError, match="has at most"):
        read(long, "int8")


@pytest.mark.parametrize(
    ("family", "storage"),
    [("llama", "int8"), ("llama", "int4"), ("gemma3", "int8"), ("gpt_oss", "int4"), ("mimo_v2_flash", "int8")],
)
def test_what_is_assembled_is_near_what_is_assembled_of_exact_segments(family, storage):
    """At other places than where the texts were read, so that keys are dequantised and then rotated."""
    model = make_model(family, max_position_embeddings=2048)
    plan = random_plan(model.config)
    parts = texts((150, 70, 33))
    caches = []
    for name in ("model", storage):
        store = SegmentStore(model, plan, storage=name)
        refs = [store.add(BOS), *store.add_all(parts, BOS)]
        caches.append(assemble(model, refs, boundary=4, force=True))
    wanted, found = (next_logits(model, cache) for cache in caches)
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < {"int8": 0.05, "int4": 0.5}[storage]


@pytest.mark.parametrize("storage", ["model", "int8"])
def test_rows_of_an_assembled_cache_follow_the_plan_s_storages(llama, global_plan, storage, monkeypatch):
    seen = watch(monkeypatch)
    plan = global_plan.stored("int8", heads=[(0, 0), (1, 2)]).stored("int4", heads=[(0, 1)])
    parts = texts((150, 170, 33))
    store = SegmentStore(llama, plan, storage=storage)
    refs = [store.add(BOS), *store.add_all(parts, BOS)]
    cache = assemble(llama, refs, boundary="all" if storage == "model" else 8)
    assert set(cache.nbytes_by_storage) == {"model", "int8", "int4"}
    lengths = sum(map(len, refs))
    for held in cache._storages():
        assert held.cold.counts.tolist() == [held.rows.rules.cold_pages(lengths)]
    seen.clear()
    found, wanted = next_logits(llama, cache), dense(llama, global_plan, [*BOS, *joined(parts)])
    assert len(seen) == 2
    assert min(seen) > 0
    if storage == "model":
        assert (found - wanted).norm() < 0.3 * wanted.norm()


def test_refresh_takes_segments_in_fewer_bits(llama, global_plan):
    store = SegmentStore(llama, global_plan, storage="int8", keep="full")
    refs = [store.add(BOS), *store.add_all(texts((60, 70)), BOS)]
    exact = SegmentStore(llama, global_plan, keep="full")
    wanted = refresh(llama, [exact.add(ref.ids, ref.prefix) for ref in refs], share=0.2)
    found = refresh(llama, refs, share=0.2)
    a, b = (next_logits(llama, cache, QUESTION) for cache in (found, wanted))
    assert (a - b).norm() < 0.1 * b.norm()


def test_wrong_storages_are_refused(llama, global_plan):
    with pytest.raises(ValueError, match="storage='int2': choose one of"):
        SegmentStore(llama, global_plan, storage="int2")
    odd = make_model("llama", num_hidden_layers=1, head_dim=18)
    odd.config.v_head_dim = 9
    with pytest.raises(ValueError, match="a head dim is 9: use 'int8'"):
        SegmentStore(odd, HeadPlan.uniform(odd.config, HeadSpec()), storage="int4")
    assert isinstance(segment(3).coarsened(None), Segment)
