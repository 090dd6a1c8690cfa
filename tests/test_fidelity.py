import pytest
import torch
from families import make_model
from oracle import masked_logits, random_plan
from texts import profiling_prompts as prompts

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import Prompt, fidelity


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def test_fidelity_by_length(model):
    plan, some = random_plan(model.config), [*prompts(60, 1), *prompts(40, 2)]
    short, long = fidelity(model, plan, some)
    assert (short["length"], short["prompts"], long["length"], long["prompts"]) == (40, 2, 60, 1)
    assert short["kl"] > 0
    assert 0 < short["agreement"] < 1
    whole = HeadPlan.uniform(model.config, HeadSpec())
    assert all(r["kl"] < 1e-6 and r["agreement"] == 1 and r["holds"] for r in fidelity(model, whole, some))
    assert fidelity(model, plan, []) == []


def test_a_plan_holds_where_it_is_as_right_as_the_model(model):
    """Of tokens that the model itself predicts, a plan that changes predictions misses some."""
    ids = prompts()[0].ids.clone()
    for place in range(20, 40):
        ids[place] = masked_logits(model, HeadPlan.uniform(model.config, HeadSpec()), ids[None])[0, place - 1].argmax()
    prompt = Prompt(ids, torch.arange(40) >= 20)
    found = {}
    for window in (1, 39):
        (found[window],) = fidelity(model, HeadPlan.uniform(model.config, HeadSpec(window)), [prompt])
        assert found[window]["dense_accuracy"] == 1
        assert found[window]["accuracy"] == found[window]["agreement"]
    assert not found[1]["holds"]
    assert found[39]["holds"]
