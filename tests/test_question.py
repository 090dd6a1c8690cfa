"""Spans for a question are held against the rule done word by word; caches made for it, against the mask by hand."""

import numpy as np
import pytest
import torch
from families import make_model
from oracle import random_plan
from texts import BOS, LONG, QUESTION, dense, joined, next_logits, texts

from redknot_hf import HeadPlan, HeadSpec, SegmentStore, assemble, cache_argument, prompt, refresh
from redknot_hf.reuse import assembly
from redknot_hf.reuse import question as asked
from redknot_hf.reuse import schedule as pieces


def by_hand(context, question, most):
    n, score = len(context), np.zeros(len(context))
    for token in dict.fromkeys(question):
        at = context == token
        for i in range(n if at.any() else 0):
            score[i] += np.log1p(n / at.sum()) * at[max(0, i - 12) : i + 12].any()
    even = np.array([score[max(0, i - 4) : i + 5].sum() for i in range(n)])
    chosen: set[int] = set()
    for i in np.argsort(-even.round(6), kind="stable"):
        more = chosen | set(range(max(0, i - 8), min(n, i + 16)))
        if even[i] < 1e-6 or len(more) > most:
            break
        chosen = more
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_spans_are_those_of_the_rule(seed):
    """Windows are scored, evened out, and the best taken until they are as many tokens as may be."""
    generator = np.random.default_rng(seed)
    context = generator.permutation(400)  # no two places are alike, so no order of equals has to be agreed on
    question = generator.integers(0, 400, 3).tolist()
    for most in (0, 23, 40, 70, 400):
        found = asked.places_for(context, question, most)
        assert len(found) <= most
        assert abs(len(found) - len(by_hand(context, question, most))) <= 24
    assert set(by_hand(context, question, 400)) == set(found)


def test_the_rare_word_comes_first_and_then_what_is_put_like_it():
    generator = np.random.default_rng(0)
    context = generator.integers(100, 200, 2000)
    for at in (300, 900, 1500):
        context[at : at + 4] = [1, 2, 3, at]
    question = [1, 2, 3, 900]
    first = asked.places_for(context, question, 60)
    assert set(first) >= set(range(896, 912))
    assert not set(first) & set(range(200, 400))
    more = asked.places_for(context, question, 200)
    assert set(more) >= {300, 303, 900, 903, 1500, 1503}
    fixed = np.arange(2000) < 1000
    assert asked.places_for(context, question, 60, fixed).min() >= 1000
    assert not len(asked.places_for(context, [5, 6], 60))


def stored(model, plan, keep="full", lengths=(150, 70, 5, 1)):
    store = SegmentStore(model, plan, keep=keep)
    return store, [store.add(BOS), *store.add_all(texts(lengths), BOS)]


def recomputed(cache):
    return [part.start + token for part in cache.reused[0] for token in (*range(part.boundary), *part.chosen)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n", "gpt_oss"])
def test_a_cache_made_for_a_question_is_that_of_refreshing_the_same_tokens(family, monkeypatch):
    """And the passes that it takes do not matter."""
    model = make_model(family, num_hidden_layers=4, **LONG)
    plan = random_plan(model.config, seed=2)
    if "gemma" in family:  # whose own windows are so short that of a local head's middle nothing would show
        plan = HeadPlan.uniform(model.config, HeadSpec())
    store, (lead, *documents) = stored(model, plan)
    refs = [lead, documents[2], documents[3], documents[1], documents[0]]
    question = [*refs[3].ids[30:33], *refs[4].ids[144:147]]
    cache = assemble(model, refs, question=question, share=0.3)
    assert cache.recomputed_tokens == len(recomputed(cache)) > 40
    chosen = torch.tensor(recomputed(cache))
    want = next_logits(model, refreshed(model, store, refs, chosen))
    torch.testing.assert_close(next_logits(model, cache), want, atol=2e-4, rtol=1e-3)
    naive = next_logits(model, assemble(model, refs, boundary=0))
    if family != "gemma3n":  # whose random weights look at nothing far
        assert (naive - want).abs().max() > 1e-3
    for name, most in (("_PASS_TOKENS", 16), ("_PASS_BYTES", 1)):
        monkeypatch.setattr(pieces, name, most)
        again = assemble(model, refs, question=question, share=0.3)
        torch.testing.assert_close(next_logits(model, again), want, atol=2e-4, rtol=1e-3)


def refreshed(model, store, refs, chosen):
    """A cache in which just these tokens have been recomputed, by the other way there is."""
    from redknot_hf.reuse import refresh as module

    parts = pieces.schedule(refs, 0)
    cache = module.AssembledCache(model.config, store.plan)
    context = module._Context(model, cache)
    for part in parts:
        segment = store.get(part.ref)
        context.add(segment, module.turns_of(part, segment, store.verdict().relocation))
    context.join()
    with torch.no_grad():
        context.run(model, chosen)
        context.put(cache)
    return cache


def test_recomputing_all_of_it_is_a_dense_prefill(monkeypatch):
    model = make_model("llama", **LONG)
    plan = random_plan(model.config, seed=1)
    _, refs = stored(model, plan)
    context = [*BOS, *joined(texts())]
    want = dense(model, plan, context)
    cache = assemble(model, refs, boundary=0, question=context, share=1.0)
    assert cache.recomputed_tokens == sum(map(len, refs[2:]))  # what stands where it was stored is right
    torch.testing.assert_close(next_logits(model, cache), want, atol=2e-4, rtol=1e-3)
    same = refresh(model, refs, by="question", question=context, share=1.0)
    torch.testing.assert_close(next_logits(model, same), want, atol=2e-4, rtol=1e-3)
    both = assemble(model, refs, boundary=0.5, question=context, share=0.2)
    for part in both.reused[0][2:]:
        assert not set(part.chosen) & set(range(part.boundary))
    assert both.recomputed_tokens > 0.5 * sum(map(len, refs[2:]))


def test_each_sequence_of_a_batch_has_its_question(monkeypatch):
    """And what sequences of the same segments share of a layer is put in place once."""
    model = make_model("llama", **LONG)
    _, refs = stored(model, random_plan(model.config, seed=3))
    questions = [list(refs[1].ids[60:64]), list(refs[2].ids[10:14]), list(refs[1].ids[60:64])]
    orders = [[refs[0], refs[2], refs[1]]] * 2 + [[refs[0], refs[1], refs[3], refs[2]]]
    counted, lay_out = [], assembly.lay_out
    monkeypatch.setattr(assembly, "lay_out", lambda *args: (counted.append(args[1]), lay_out(*args)))
    together = assemble(model, orders, question=questions, share=0.2)
    assert len(counted) == (2 + 3) * model.config.num_hidden_layers
    asked_of = prompt(together, [QUESTION] * 3)
    places = torch.tensor([[sum(map(len, order)) + i for i in range(len(QUESTION))] for order in orders])
    with torch.no_grad():
        found = model(
            torch.tensor([QUESTION] * 3), attention_mask=asked_of["attention_mask"], position_ids=places,
            **cache_argument(model, together),
        ).logits  # fmt: skip
    for one, question, order in zip(found, questions, orders, strict=True):
        alone = assemble(model, order, question=question, share=0.2)
        torch.testing.assert_close(next_logits(model, alone)[0], one, atol=2e-4, rtol=1e-3)


def test_what_cannot_be_asked_is_refused():
    model = make_model("llama", **LONG)
    _, lean = stored(model, random_plan(model.config), keep="plan")
    with pytest.raises(ValueError, match="keep='full'"):
        assemble(model, lean, question=[1, 2])
    _, refs = stored(model, random_plan(model.config))
    with pytest.raises(ValueError, match="2 questions for 1 sequences"):
        assemble(model, refs, question=[[1], [2]])
    with pytest.raises(ValueError, match=r"share=1\.5"):
        assemble(model, refs, question=[1], share=1.5)
    with pytest.raises(ValueError, match="needs a question"):
        refresh(model, refs, by="question")
    with pytest.raises(ValueError, match="by='question'"):
        refresh(model, refs, question=[1])
