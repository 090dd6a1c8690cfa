"""A process that reads and one that answers, over a store's shared tier: the tokens of a single engine."""

import pytest
from families import make_model
from served import SIZES, all_free, alone, plan_of, prompts_of
from services import redis_server

from redknot_hf import SegmentStore
from redknot_hf.serving import Engine, Sampling
from redknot_hf.serving.apart import answer, read_ahead

NEW = Sampling(max_new_tokens=8)


@pytest.mark.parametrize(
    ("family", "local"), [("llama", True), ("llama", False), ("gemma4", True), ("mistral_sliding", True)]
)
def test_prompts_read_elsewhere_are_answered_alike(family, local, tmp_path):
    reader_model, model = make_model(family), make_model(family)
    plan = plan_of(model, local)
    prompts = [prompt for prompt in prompts_of(3, 2)[0] if len(prompt) > 1]
    reads = SegmentStore(reader_model, plan, path=tmp_path)
    addresses = read_ahead(reads, prompts)
    assert len({*addresses}) == len({tuple(prompt[:-1]) for prompt in prompts})
    store, engine = SegmentStore(model, plan, path=tmp_path), Engine(model, plan, **SIZES)
    asked = [answer(engine, store, prompt, NEW) for prompt in prompts]
    engine.drain()
    assert [request.result() for request in asked] == [alone(model, plan, prompt, 8) for prompt in prompts]
    assert store.counts.computed == store.counts.recomputed == 0
    assert store.counts.hits["disk"] > 0
    assert engine.reader.read == len(prompts)  # the last token of each
    assert all_free(engine)


def test_what_was_lost_on_the_way_is_read_by_who_answers(tmp_path):
    model = make_model("llama")
    plan, prompt = plan_of(model), prompts_of(4, 2)[0][-1]
    with redis_server(tmp_path) as server:
        read_ahead(SegmentStore(make_model("llama"), plan, remote=server.url), [prompt])
        store, engine = SegmentStore(model, plan, remote=server.url), Engine(model, plan, **SIZES)
        (entry,) = store.stored()
        store.drop(entry.address)
        request = answer(engine, store, prompt, NEW)
        engine.drain()
        assert request.result() == alone(model, plan, prompt, 8)
        assert store.counts.recomputed == 1
        assert [one.address for one in store.stored()] == [entry.address]  # and it is there again


def test_what_does_not_fit_together_is_refused():
    model = make_model("llama")
    plan = plan_of(model)
    engine = Engine(model, plan, **SIZES)
    with pytest.raises(ValueError, match="another model or plan"):
        answer(engine, SegmentStore(model, plan_of(model, local=False)), [1, 2], NEW)
    with pytest.raises(ValueError, match="keeps 'full'"):
        answer(engine, SegmentStore(model, plan, keep="full"), [1, 2], NEW)
    with pytest.raises(ValueError, match="two at least"):
        read_ahead(SegmentStore(model, plan), [[1]])
