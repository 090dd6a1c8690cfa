import pytest
import torch
from families import make_model
from oracle import random_plan
from texts import BOS, dense, joined, next_logits, texts

from redknot_hf import HeadPlan, HeadSpec, SegmentStore, assemble, refresh

LONG = {"max_position_embeddings": 2048}


def stored(model, plan, documents):
    store = SegmentStore(model, plan, keep="full")
    return [store.add(BOS), *store.add_all(documents, BOS)]


@pytest.mark.parametrize("by", ["deviation", "attention"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "gemma4"])
def test_refreshing_all_is_a_dense_prefill_and_nothing_is_naive_reuse(family, by):
    model = make_model(family, **LONG)
    plan = random_plan(model.config, seed=1)
    documents = texts((90, 300, 1))
    refs = stored(model, plan, documents)
    want = dense(model, plan, [*BOS, *joined(documents)])
    cache = refresh(model, refs, share=1.0, by=by)
    assert cache.refreshed_tokens == 301  # the first document stands where it was stored
    torch.testing.assert_close(next_logits(model, cache), want, atol=2e-4, rtol=1e-3)
    naive = next_logits(model, assemble(model, refs, boundary=0))
    torch.testing.assert_close(next_logits(model, refresh(model, refs, share=0, by=by)), naive, atol=2e-4, rtol=1e-3)
    assert model.config._attn_implementation == "redknot"


@pytest.mark.parametrize("by", ["deviation", "attention"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "gemma4"])
def test_nothing_to_recompute_is_naive_reuse(family, by):
    """A text in its own place, and a share that is less than a token."""
    model = make_model(family, **LONG)
    store = SegmentStore(model, random_plan(model.config, seed=1), keep="full")
    right = [store.add([5, 6, 7])], [store.add([1, 2]), store.add([5, 6, 7], prefix=[1, 2])]
    for refs in (*right, [store.add([5], prefix=[1])]):
        cache = refresh(model, refs, share=0.15, by=by)
        assert cache.refreshed_tokens == cache.recomputed_tokens == 0
        naive = next_logits(model, assemble(model, refs, boundary=0))
        torch.testing.assert_close(next_logits(model, cache), naive, atol=2e-4, rtol=1e-3)


def test_the_error_falls_with_the_share():
    model = make_model("llama", **LONG)
    plan = HeadPlan.uniform(model.config, HeadSpec())
    errors = torch.zeros(3)
    for seed in range(4):
        documents = texts((40, 40, 40), seed)
        refs = stored(model, plan, documents)
        want = dense(model, plan, [*BOS, *joined(documents)]).log_softmax(-1)
        for i, share in enumerate((0, 0.6, 1.0)):
            found = next_logits(model, refresh(model, refs, share=share)).log_softmax(-1)
            errors[i] += (want.exp() * (want - found)).sum(-1).mean()
    assert errors[0] > errors[1] > 10 * errors[2]


def test_tokens_that_deviate_most_are_chosen():
    """Of a model whose second layer reads one place ahead, the first token after a seam deviates most."""
    model = make_model("llama", **LONG)
    plan = HeadPlan.with_global(model.config, [], local=HeadSpec(2, 0))
    refs = stored(model, plan, texts((30, 30, 30)))
    cache = refresh(model, refs, share=2 / 60)
    other = assemble(model, refs, boundary=[0, 0, 1, 1])
    assert cache.refreshed_tokens == other.recomputed_tokens == 2
    torch.testing.assert_close(next_logits(model, cache), next_logits(model, other), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_refreshed_is_refused():
    model = make_model("llama", **LONG)
    plan = random_plan(model.config)
    lean = SegmentStore(model, plan)
    with pytest.raises(ValueError, match="keep='full'"):
        refresh(model, [lean.add([1, 2])])
    (ref, *_) = stored(model, plan, texts((9,)))
    for options, said in (
        ({"share": 2.0}, "share=2.0"), ({"by": "luck"}, "by='luck'"), ({"depth": 4}, "depth=4"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            refresh(model, [ref], **options)
    with pytest.raises(ValueError, match="got 2"):
        refresh(model, [[ref], [ref]])
