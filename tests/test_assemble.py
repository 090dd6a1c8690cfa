"""Assembled caches are held against a pass over the whole text, and against naive reuse computed by hand."""

import copy
import pickle

import pytest
import torch
from families import make_model
from oracle import random_plan, under_plan
from texts import BOS, LENGTHS, LONG, QUESTION, dense, joined, next_logits, texts
from transformers import DynamicCache

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, SegmentStore, assemble, cache_argument, prompt
from redknot_hf.reuse import schedule as pieces


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", **LONG)


@pytest.fixture(scope="module")
def store(llama):
    return SegmentStore(llama, random_plan(llama.config))


@pytest.fixture(scope="module")
def documents(store):
    return [store.add(BOS), *store.add_all(texts(), BOS)]


FAMILIES = [
    "llama",
    "mistral_sliding",
    "gemma3",
    "phi3",
    "gpt_oss",
    "glm4",
    "smollm3",
    "gemma4",
    "gemma4_ragged",
    "mimo_v2_flash",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_all_is_a_dense_prefill_and_a_true_prefix_needs_nothing(family):
    model = make_model(family, **LONG)
    plan = random_plan(model.config, seed=1)
    store = SegmentStore(model, plan)
    lead, *documents = [store.add(BOS), *store.add_all(texts(), BOS)]
    parts = [BOS, *texts()]
    cache = assemble(model, [lead, *documents], boundary="all")
    torch.testing.assert_close(next_logits(model, cache), dense(model, plan, joined(parts)), atol=2e-4, rtol=1e-3)

    behind = store.add(parts[2], [*BOS, *parts[1]])  # what stands before it is just its prefix
    cache = assemble(model, [lead, documents[0], behind], boundary=7)
    assert cache.recomputed_tokens == 0
    assert not any(part.moved for part in cache.reused[0])
    want = dense(model, plan, joined(parts[:3]))
    torch.testing.assert_close(next_logits(model, cache), want, atol=2e-4, rtol=1e-3)


def turned(keys, shift, model):
    """Moves keys as complex numbers, in float64: pairs are those of the two halves."""
    angle = torch.exp(1j * shift * model.model.rotary_emb.inv_freq.double())
    half = keys.shape[-1] // 2
    pairs = torch.complex(keys[..., :half].double(), keys[..., half:].double()) * angle
    return torch.cat([pairs.real, pairs.imag], -1).to(keys.dtype)


def stored(model, plan, ids):
    """Keys and values of all tokens of all heads, computed under the plan."""
    cache = DynamicCache(config=model.config)
    with under_plan(model, plan), torch.no_grad():
        model(torch.tensor([ids]), **cache_argument(model, cache))
    return [(layer.keys, layer.values) for layer in cache.layers]


def test_naive_reuse_is_what_is_computed_by_hand(llama, store, documents):
    order = [0, 3, 1, 2, 4]
    parts = [BOS, *texts()]
    cache = assemble(llama, [documents[i] for i in order], boundary=0)
    assert cache.recomputed_tokens == 0

    by_hand, offset = DynamicCache(config=llama.config), 0
    for i in order:
        behind = [] if i == 0 else BOS
        for layer, (keys, values) in enumerate(stored(llama, store.plan, [*behind, *parts[i]])):
            own = (x[:, :, len(behind) :] for x in (turned(keys, offset - len(behind), llama), values))
            by_hand.update(*own, layer)
        offset += len(parts[i])
    with under_plan(llama, store.plan), torch.no_grad():
        want = llama(torch.tensor([QUESTION]), **cache_argument(llama, by_hand)).logits
    torch.testing.assert_close(next_logits(llama, cache), want, atol=2e-4, rtol=1e-3)
    assert (want - dense(llama, store.plan, joined(parts[i] for i in order))).abs().max() > 0.1


@pytest.mark.parametrize("boundary", [1, 16, 0.3, [0, 4, 0.5, "all", 1], lambda ref, start: start % 7])
def test_a_full_store_gives_the_same_cache(llama, store, documents, boundary):
    full = SegmentStore(llama, store.plan, keep="full")
    whole = [full.add(BOS), *full.add_all(texts(), BOS)]
    order = [0, 2, 4, 3, 1]
    caches = [assemble(llama, [refs[i] for i in order], boundary=boundary) for refs in (documents, whole)]
    assert caches[0].recomputed_tokens == caches[1].recomputed_tokens > 0
    torch.testing.assert_close(*(next_logits(llama, cache) for cache in caches), atol=1e-4, rtol=1e-4)


def test_the_error_falls_as_the_boundary_grows(llama):
    plan = HeadPlan.uniform(llama.config, HeadSpec())
    store = SegmentStore(llama, plan)
    errors = torch.zeros(3)
    for seed in range(4):
        documents = texts((40, 40, 40), seed)
        refs = [store.add(BOS), *store.add_all(documents, BOS)]
        want = dense(llama, plan, [*BOS, *joined(documents)]).log_softmax(-1)
        for i, boundary in enumerate((0, 0.6, "all")):
            found = next_logits(llama, assemble(llama, refs, boundary=boundary)).log_softmax(-1)
            errors[i] += (want.exp() * (want - found)).sum(-1).mean()
    assert errors[0] > errors[1] > 10 * errors[2]


def test_a_batch_shares_its_lead_and_equals_single_contexts(llama, store, documents):
    batch = [[0, 1, 2], [0, 1, 3, 4], [0, 1]]
    refs = [[documents[i] for i in one] for one in batch]
    questions = [QUESTION, QUESTION[:4], QUESTION[2:]]
    cache = assemble(llama, refs, boundary=0.2)
    shared = [
        (layer.storage.rows.table[:, h, :2]) for layer in cache.layers for h in layer.storage.rows.rules.global_heads
    ]
    assert shared
    assert all((pages[0] == pages).all() for pages in shared)
    inputs = prompt(refs, questions)
    assert inputs["attention_mask"].sum(1).tolist() == [
        sum(len(documents[i]) for i in one) + len(q) for one, q in zip(batch, questions, strict=True)
    ]
    out = llama.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
    for b, (one, question) in enumerate(zip(refs, questions, strict=True)):
        alone = assemble(llama, one, boundary=0.2)
        want = llama.generate(**prompt(one, question), past_key_values=alone, max_new_tokens=4, do_sample=False)
        assert out[b, -4:].tolist() == want[0, -4:].tolist()


def test_one_context_answers_several_questions(llama, documents):
    cache = assemble(llama, documents[:3], boundary=3)
    forks = [next_logits(llama, copy.deepcopy(cache), question) for question in (QUESTION, QUESTION[::-1])]
    for question, want in zip((QUESTION, QUESTION[::-1]), forks, strict=True):
        torch.testing.assert_close(next_logits(llama, cache, question), want)
        cache.crop(-len(question))


def test_a_reserved_cache_can_be_assembled(llama, documents):
    growing, reserved = (assemble(llama, documents, boundary=5, max_cache_len=n) for n in (None, 300))
    torch.testing.assert_close(next_logits(llama, reserved), next_logits(llama, growing))
    with pytest.raises(ValueError, match="max_cache_len=100"):
        assemble(llama, documents, boundary=0, max_cache_len=100)


@pytest.mark.parametrize("tokens", [8192, 1])
def test_kernels_of_triton_assemble_the_same_also_where_steps_are_captured(tokens, monkeypatch):
    monkeypatch.setattr(pieces, "_PASS_TOKENS", tokens)
    model = make_model("llama", num_hidden_layers=1)
    store = SegmentStore(model, HeadPlan([[HeadSpec(), HeadSpec(3, 2), HeadSpec(17, 4), HeadSpec(1, 0)]]))
    first, *others = [store.add(BOS), *store.add_all(texts((30, 20)), BOS)]
    options = {"boundary": 2, "page_size": 16, "max_cache_len": 60}
    found = []
    for impl in ("torch", "triton"):
        cache = assemble(model, [first, *others[::-1]], impl=impl, **options)
        assert cache.is_compileable == (impl == "triton")
        found.append(next_logits(model, cache, QUESTION[:1]))
        assert cache.get_seq_length() == 53
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_the_same_segment_twice_and_in_any_order(llama, store, documents):
    refs = [documents[1], documents[0], documents[1], documents[4], documents[4]]
    for boundary in ("all", 0):
        cache = assemble(llama, refs, boundary=boundary)
        assert cache.get_seq_length() == sum(map(len, refs))
        found = next_logits(llama, cache)
        assert found.isfinite().all()
        if boundary == "all":
            want = dense(llama, store.plan, joined(ref.ids for ref in refs))
            torch.testing.assert_close(found, want, atol=2e-4, rtol=1e-3)


def test_reading_goes_on_in_further_turns(llama, store):
    """Behind a true prefix everything is as if the text had been read: crops and longer rings, too."""
    (text,) = texts((200,))
    cache = assemble(llama, [store.add(text)])
    cache.activate_past_recording()
    next_logits(llama, cache, QUESTION)
    cache.crop(-4)
    more = texts((90,), seed=5)[0]
    want = dense(llama, store.plan, [*text, *QUESTION[:-4]], more)
    torch.testing.assert_close(next_logits(llama, cache, more), want, atol=2e-4, rtol=1e-3)


def test_what_cannot_be_assembled_is_refused(llama, store, documents):
    with pytest.raises(ValueError, match="no segments"):
        assemble(llama, [])
    with pytest.raises(ValueError, match="2 stores"):
        assemble(llama, [documents[0], SegmentStore(llama, store.plan).add([5])])
    with pytest.raises(ValueError, match="another model"):
        assemble(make_model("llama"), documents)
    for boundary in (-1, 1.5, True, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="boundary="):
            assemble(llama, documents, boundary=boundary)
    with pytest.raises(ValueError, match="2 entries for 5"):
        assemble(llama, documents, boundary=[1, 2])
    with pytest.raises(ValueError, match="2 suffixes for 1"):
        prompt(documents, [[1], [2]])


def test_an_assembled_cache_is_a_plain_one(llama, documents):
    cache = assemble(llama, documents[:2], boundary=2)
    assert isinstance(cache, RedKnotCache)
    other = pickle.loads(pickle.dumps(cache))
    torch.testing.assert_close(next_logits(llama, other), next_logits(llama, copy.deepcopy(cache)))
    assert other.reused == cache.reused
    with pytest.raises(ValueError, match="another process"):
        assemble(llama, [part.ref for part in other.reused[0]])
    assert cache.reused_tokens == len(BOS) + LENGTHS[0]
