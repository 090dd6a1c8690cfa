import pytest
import torch
from families import make_model
from oracle import masked_logits, random_plan
from texts import profiling_prompts as prompts

from redknot_hf.attention.watching import restricted, watching
from redknot_hf.profiling import profile_heads


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_sliding", "gpt_oss"])
def test_restricted_is_the_masked_oracle(family):
    model, ids = make_model(family), prompts()[0].ids[None]
    plan = random_plan(model.config)
    with torch.no_grad(), watching(model, restricted(plan)):
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, masked_logits(model, plan, ids), rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "redknot"


def test_hooks_and_attributes_are_gone_afterwards():
    model, before = make_model("llama"), prompts()
    profile_heads(model, before, windows=(4,), method="drift")
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert not any(hasattr(module, "redknot_watcher") for module in modules)
