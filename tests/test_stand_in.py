import pytest
import torch
from families import make_model
from oracle import random_plan
from texts import BOS, LONG, dense, joined, next_logits, texts

from redknot_hf import HeadPlan, HeadSpec, SegmentStore, StandIn, assemble
from redknot_hf.reuse import schedule


def test_a_stand_in_is_made_of_beginnings_and_is_always_the_same():
    documents = texts((700, 30, 40, 600, 50))
    stand_in = StandIn.of(documents, tokens=100)
    assert stand_in == StandIn.of([torch.tensor(text) for text in reversed(documents)] + [[]], tokens=100)
    assert all(any(tuple(text[: len(piece)]) == piece for text in documents) for piece in stand_in.pieces)
    for text in documents:
        before = stand_in.before(text)
        assert len(before) == 100
        assert before == tuple(joined(piece for piece in stand_in.pieces if piece != tuple(text[:512])))[:100]
    assert StandIn.of([[1, 2]]).before([1, 2]) == ()
    for wrong, said in (({"texts": []}, "no tokens"), ({"texts": [[1]], "tokens": 0}, "tokens=0")):
        with pytest.raises(ValueError, match=said):
            StandIn.of(**wrong)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_documents_are_stored_behind_it_and_it_is_not_stored(family):
    model = make_model(family, **LONG)
    plan = random_plan(model.config, seed=1)
    documents = texts((90, 300, 60))
    stand_in = StandIn.of(documents, tokens=80)
    store, by_hand = SegmentStore(model, plan, stand_in=stand_in), SegmentStore(model, plan)
    opening, *refs = [store.add(BOS), *store.add_all(documents, BOS)]
    assert opening.prefix == ()
    assert store.counts.computed == 4
    for ref, text in zip(refs, documents, strict=True):
        want = by_hand.add(text, [*BOS, *stand_in.before(text)])
        assert ref == want
        assert ref.prefix == (*BOS, *stand_in.before(text))
        torch.testing.assert_close(store.get(ref).data, by_hand.get(want).data, atol=1e-5, rtol=1e-5)
    cache = assemble(model, [opening, *refs], boundary="all")
    torch.testing.assert_close(
        next_logits(model, cache), dense(model, plan, [*BOS, *joined(documents)]), atol=2e-4, rtol=1e-3
    )


def test_a_text_whose_prefix_is_true_has_none():
    model = make_model("llama", **LONG)
    store = SegmentStore(model, HeadPlan.uniform(model.config, HeadSpec()), stand_in=torch.arange(5, 25))
    text = texts((40,))[0]
    refs = [store.add(BOS), store.add(text, BOS, stand_in=False)]
    assert refs[1].prefix == tuple(BOS)
    assert store.ref(text, BOS).prefix == (*BOS, *range(5, 25))
    assert store.ref(text, BOS) != refs[1]
    assert assemble(model, refs).recomputed_tokens == 0
    again = store.ref(store.ref(text, BOS).ids, store.ref(text, BOS).prefix, stand_in=False)
    assert again == store.ref(text, BOS)  # so it is named anew in another process


def test_whole_documents_by_rank():
    assert schedule.by_rank([None, 0.1, 0.9, 0.5], documents=2) == [0, 0, "all", "all"]
    assert schedule.by_rank([None, -3, -1], documents=1, rest=0.2) == [0.2, 0.2, "all"]
    with pytest.raises(ValueError, match="documents=-1"):
        schedule.by_rank([1.0], documents=-1)
