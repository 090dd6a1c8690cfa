import numpy as np
import pytest
import torch
from families import make_model
from oracle import masked_logits, random_plan
from texts import profiling_prompts as prompts

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import Prompt
from redknot_hf.profiling.divergence import Divergence


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def test_divergence_is_the_kl_of_the_oracle(model):
    some, plan = prompts(count=3), random_plan(model.config)
    some[1] = Prompt(some[1].ids, torch.arange(40) % 7 == 5)
    divergence, found = Divergence(model, some), []
    for prompt in some:
        dense, mine = (
            masked_logits(model, p, prompt.ids[None])[0, prompt.targets - 1].log_softmax(-1)
            for p in (HeadPlan.uniform(model.config, HeadSpec()), plan)
        )
        found.append(float(torch.nn.functional.kl_div(mine, dense, log_target=True, reduction="batchmean")))
    np.testing.assert_allclose(divergence(plan), found, rtol=1e-3)
    np.testing.assert_allclose(divergence(plan, [2, 0]), [found[2], found[0]], rtol=1e-3)
    assert divergence(HeadPlan.uniform(model.config, HeadSpec())).max() < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_what_is_settled_changes_no_result(family):
    model = make_model(family, num_hidden_layers=4)
    divergence, base, places = Divergence(model, prompts()), random_plan(model.config), ((0, 1), (2, 0), (3, 3))
    plans = [base]
    for layer, head in places:
        heads = [list(specs) for specs in base]
        heads[layer][head] = HeadSpec(2, 0)
        plans.append(HeadPlan(heads))
    expected = [divergence(plan) for plan in plans]
    calls = []
    hooks = [layer.mlp.register_forward_hook(lambda *_: calls.append(1)) for layer in model.model.layers]
    divergence.settle(base)
    calls.clear()
    for plan, kl in zip(plans, expected, strict=True):
        np.testing.assert_allclose(divergence(plan), kl, rtol=1e-5)
    assert len(calls) == 2 * (0 + 4 + 2 + 1)  # layers that two prompts ran through
    divergence.settle(plans[1], [1])
    np.testing.assert_allclose(divergence(base), expected[0], rtol=1e-5)
    for hook in hooks:
        hook.remove()


def test_loss_that_is_not_finite_is_told():
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match="loss is not finite on a prompt of 40 tokens"):
        Divergence(model, prompts())
