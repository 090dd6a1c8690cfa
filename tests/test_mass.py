import numpy as np
import pytest
import torch
from families import make_model
from texts import profiling_prompts as prompts

from redknot_hf.profiling import Prompt, profile_heads
from redknot_hf.profiling.mass import measure_mass


def attention(model, ids):
    """Weights of all layers, `[layers, query heads, queries, keys]`, as the model itself computes them."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return torch.stack(model(ids[None], output_attentions=True).attentions)[:, 0]
    finally:
        model.set_attn_implementation("redknot")


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_sliding", "gpt_oss"])
def test_mass_is_that_of_the_weights(family):
    model, (prompt, _) = make_model(family), prompts()
    scored = Prompt(prompt.ids, torch.arange(40) % 6 == 5)
    found = measure_mass(model, [scored], (3, 9), 2, lambda: None)[0]
    whole, alone = attention(model, prompt.ids), attention(model, prompt.ids[20:])
    q, k = torch.arange(40)[:, None], torch.arange(40)
    shift = 1 - torch.cosine_similarity(whole[:, :, 20:, 24:].flatten(2), alone[..., 4:].flatten(2), dim=-1)
    for column, window in enumerate((3, 9)):
        outside = (whole * ((k <= q - window) & (k >= 2))).sum(-1)[:, :, scored.targets - 1].mean(-1)
        expected = torch.maximum(outside, shift).unflatten(1, (4, 2)).amax(-1).flatten()
        np.testing.assert_allclose(found[:, column], expected.numpy(), rtol=1e-3, atol=1e-5)


def test_mass_makes_a_profile():
    profile = profile_heads(make_model("llama"), prompts(), windows=(4, 12, 30), method="mass")
    assert (profile.errors[:, 0] >= profile.errors[:, 2]).all()
    assert profile.plan(global_ratio=0.5).num_global == 4
