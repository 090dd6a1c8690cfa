"""Reuse on an accelerator: copies between tiers run beside the computation, and nothing is read too early."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import make_model
from oracle import masked_logits, random_plan
from texts import BOS, QUESTION, joined, texts

from redknot_hf import SegmentStore, assemble, cache_argument

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")]

TIERS = {
    "device": {"device_bytes": None, "host_bytes": 0},
    "host": {"device_bytes": 0, "host_bytes": None},
    "disk": {"device_bytes": 0, "host_bytes": 0},
    "some of each": {"device_bytes": 200_000, "host_bytes": 300_000},
}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", max_position_embeddings=4096).cuda()


def next_logits(model, cache):
    with torch.no_grad():
        return model(torch.tensor([QUESTION], device="cuda"), **cache_argument(model, cache)).logits


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_serves_the_same(model, tmp_path, tier, impl):
    plan = random_plan(model.config)
    documents = texts((300, 70, 512, 5))
    store = SegmentStore(model, plan, path=None if tier in ("device", "host") else tmp_path, **TIERS[tier])
    refs = [store.add(BOS), *store.add_all(documents, BOS)]
    order = [0, 3, 1, 4, 2]
    on_host = SegmentStore(model.cpu(), plan)
    expected = {
        b: assemble(model, [on_host.ref(refs[i].ids, refs[i].prefix) for i in order], boundary=b) for b in (0, 9)
    }
    with torch.no_grad():
        want = {
            b: model(torch.tensor([QUESTION]), **cache_argument(model, cache)).logits for b, cache in expected.items()
        }
    model.cuda()
    for _ in range(3):
        for boundary, logits in want.items():
            cache = assemble(model, [refs[i] for i in order], boundary=boundary, impl=impl)
            torch.testing.assert_close(next_logits(model, cache).cpu(), logits, atol=1e-3, rtol=1e-3)
    whole = assemble(model, [refs[i] for i in order], boundary="all", impl=impl)
    parts = [BOS, *documents]
    dense = masked_logits(model, plan, torch.tensor([[*joined(parts[i] for i in order), *QUESTION]], device="cuda"))
    torch.testing.assert_close(next_logits(model, whole), dense[:, -len(QUESTION) :], atol=1e-3, rtol=1e-3)


def test_what_threads_on_streams_of_their_own_get_is_right(model, tmp_path):
    store = SegmentStore(model, random_plan(model.config), device_bytes=300_000, host_bytes=300_000, path=tmp_path)
    refs = store.add_all(texts([100 + 7 * i for i in range(12)]), BOS)
    want = {ref: store.get(ref).data.cpu() for ref in refs}

    def use(seed):
        order = torch.randperm(len(refs), generator=torch.Generator().manual_seed(seed)).tolist()
        with torch.cuda.stream(torch.cuda.Stream()):
            return all(torch.equal(store.get(refs[i]).data.cpu(), want[refs[i]]) for i in order)

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(use, range(24)))
    assert store.counts.recomputed == 0


def test_a_gpu_lets_go_of_what_left(model):
    plan = random_plan(model.config)
    store = SegmentStore(model, plan, device_bytes=10**6, host_bytes=10**7)
    store.add(texts((400,))[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(30):
        store.add(texts((400,), seed)[0])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 1.1 * 10**6
