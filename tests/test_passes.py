"""Passes through a model, without `generate`: at boundaries, packed, and under masks of the caller's own."""

import pytest
import torch
from families import make_model
from oracle import masked_logits, random_plan
from texts import prompts
from transformers import DynamicCache

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument


@pytest.fixture(params=["llama", "gemma3", "mistral_sliding", "gpt_oss"])
def model(request):
    return make_model(request.param)


def new_cache(model, plan, **options):
    return RedKnotCache(model.config, plan, **{"page_size": 16} | options)


SINK, WINDOW, PAGE = 5, 21, 16


BOUNDARIES = {
    n for edge in (SINK, WINDOW, PAGE, SINK + WINDOW, SINK + WINDOW + PAGE) for n in (edge - 1, edge, edge + 1)
}


@pytest.mark.parametrize("length", sorted({1, 2} | BOUNDARIES))
def test_prompts_that_end_at_a_boundary(model, length):
    plan = HeadPlan.with_global(model.config, [(i, i) for i in range(len(model.model.layers))], HeadSpec(WINDOW, SINK))
    ids, _ = prompts(2, length + 3)
    cache = new_cache(model, plan, page_size=PAGE)
    with torch.no_grad():
        parts = [ids[:, :length], *ids[:, length:].split(1, 1)]
        logits = torch.cat([model(part, **cache_argument(model, cache)).logits for part in parts], 1)
    torch.testing.assert_close(logits, masked_logits(model, plan, ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["llama", "gemma2", "gemma3", "mistral_sliding"], indirect=True)
def test_packed_sequences_without_a_cache(model):
    """Positions that start anew part the sequences."""
    ids, _ = prompts(2, 60)
    positions = torch.cat([torch.arange(n) for n in (17, 1, 42)]).expand(2, -1)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in ids.split([17, 1, 42], 1)]
        model.set_attn_implementation("eager")
        dense = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, dense, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-4, rtol=1e-4)


# Models whose layers all see everything: transformers lets a 4-D mask replace the model's own window.
MASKED = ["llama", "gemma2", "gpt_oss"]


@pytest.mark.core
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("prefix", [0, 23], ids=["causal", "two-sided prefix"])
@pytest.mark.parametrize("family", MASKED)
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_masks_of_the_callers_own(family, local, prefix, kind):
    model = make_model(family, layer_types=["full_attention"] * 2)
    plan = random_plan(model.config) if local else HeadPlan.uniform(model.config, HeadSpec())
    ids, _ = prompts(2, 50)
    seen = torch.ones(50, 50, dtype=torch.bool).tril()
    seen[:prefix, :prefix] = True
    seen = seen.repeat(2, 1, 1, 1)
    seen[1, :, 30:, 4:9] = False  # what one sequence stops to see
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    steps = [(0, 37), (37, 47), (47, 48), (48, 49), (49, 50)]

    def run(cache, mask):
        with torch.no_grad():
            parts = [
                model(ids[:, a:b], attention_mask=mask[:, :, a:b, :b], **cache_argument(model, cache)).logits
                for a, b in steps
            ]
        return torch.cat(parts, 1)

    ours = run(new_cache(model, plan), seen if kind == "bool" else added)
    if local:
        dense = masked_logits(model, plan, ids, seen)
    else:
        model.set_attn_implementation("eager")
        dense = run(DynamicCache(config=model.config), added)
    torch.testing.assert_close(ours, dense, atol=2e-4, rtol=1e-4)
