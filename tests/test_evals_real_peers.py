"""Other libraries' ways on the frontier's items: what they keep of a context is what their own caches keep."""

from types import SimpleNamespace

import pytest
import torch
from families import make_model
from transformers import QuantizedCache

from evals.method import by_name
from evals.real.contenders import Contender
from evals.real.frontier import asked, predicted
from evals.real.items import TASKS, Item
from evals.real.peers import Press, Quantised, _behind, peers
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.attention.watching import watching


@pytest.fixture(scope="module")
def model_and_item():
    ids = torch.randint(1, 97, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    return make_model("llama"), Item(ids, {task: [[65], [70, 71]] for task in TASKS}, context=60)


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantised_is_the_cache_of_that_name(model_and_item, backend):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    model, item = model_and_item
    mine = predicted(model, Quantised(backend, 4), item)
    cache = QuantizedCache(backend, model.config, nbits=4)
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            model(torch.tensor([item.ids[:60]]), **by_name(cache))
            logits = model(torch.tensor([item.ids[60:]]), **by_name(cache)).logits[0]
    finally:
        model.set_attn_implementation("redknot")
    theirs = logits[torch.tensor(item.places) - 61].log_softmax(-1)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    dense = predicted(model, Contender("dense", 1.0, 1.0, HeadPlan.uniform(model.config, HeadSpec())), item)
    assert not torch.allclose(mine, dense, atol=1e-4)


def test_what_is_not_kept_of_a_context_is_not_seen_behind_it(model_and_item):
    model, item = model_and_item
    kept = torch.rand(4, 60, generator=torch.Generator().manual_seed(1)) < 0.3
    seen = {}

    def watcher(call):
        found = _behind(call, call.key[:, :, :60], call.value[:, :, :60], kept[: call.heads])
        q = call.query.unflatten(1, (call.heads, -1))
        scores = torch.einsum("bhgqd,bhkd->bhgqk", q, call.key) * call.options["scale"]
        mask = torch.ones(80, 80, dtype=torch.bool).tril().repeat(call.heads, 1, 1)
        mask[:, 60:, :60] &= kept[: call.heads, None]
        weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        seen[call.layer] = found, torch.einsum("bhgqk,bhkd->bqhgd", weights, call.value).flatten(2, 3)
        return found

    with torch.no_grad(), watching(model, watcher):
        model(torch.tensor([item.ids]), use_cache=False)
    for found, expected in seen.values():
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_press_hides_what_it_says(model_and_item, monkeypatch):
    """A press is given the context alone, and its choice holds for the questions."""
    model, item = model_and_item
    given = []

    def compress(module, hidden, key, value, attentions, more):
        given.append((hidden.shape[1], key.shape[2], more["position_embeddings"][0].shape[1], value.shape[2]))
        module.masked_key_indices = (torch.zeros(0, dtype=torch.long),) * 3

    press = SimpleNamespace(post_init_from_model=lambda model: None, compress=compress)
    monkeypatch.setattr("evals.real.peers._press", lambda scorer, ratio: press)
    rows = asked(model, 0, item, [Press("SnapKV", 0.2)])
    assert set(given) == {(60, 60, 60, 60)}
    assert [row["method"] for row in rows] == ["dense", "kvpress AdaKV SnapKV"]
    assert set(rows[1]["tasks"]) == set(TASKS) - {"text"}
    assert rows[1]["tasks"]["words"][4] == pytest.approx(0, abs=1e-5)
    assert not any(hasattr(module, "masked_key_indices") for module in model.modules())
    monkeypatch.setattr("evals.real.peers.find_spec", lambda name: name)  # whatever is installed here
    assert {peer.method for peer in peers()} >= {"kvpress AdaKV ExpectedAttention", "transformers quanto 2 bits"}
