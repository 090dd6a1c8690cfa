"""The two equalities that hold the library, for every supported family."""

import pytest
import torch
from families import FAMILIES, make_model
from oracle import masked_logits, random_plan
from texts import prompts
from transformers import DynamicCache

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

CORE = "llama", "gemma3", "gemma3n", "gpt_oss"  # also run on the oldest supported transformers
families = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.core if f in CORE else ()) for f in FAMILIES]
)


@families
def test_all_global_equals_dynamic_cache_token_for_token(family):
    model = make_model(family)
    ids, mask = prompts(2, 40, padding=(0, 9))
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    plan = HeadPlan.uniform(model.config, HeadSpec())
    caches = [RedKnotCache(model.config, plan, page_size=size) for size in (16, 64)]
    ours = [model.generate(ids, past_key_values=cache, **options) for cache in caches]
    model.set_attn_implementation("eager")
    dense = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    assert torch.equal(ours[0], dense)
    assert torch.equal(ours[1], dense)


@families
def test_any_plan_equals_the_explicit_mask_at_every_step(family):
    model = make_model(family)
    ids, mask = prompts(2, 75, padding=(0, 9))
    plan = random_plan(model.config, seed=len(family))
    expected = masked_logits(model, plan, ids, mask)
    cache = RedKnotCache(model.config, plan, page_size=16)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for start, stop in [(0, 33), (33, 52), *((i, i + 1) for i in range(52, 75))]:
            logits = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                **cache_argument(model, cache),
            ).logits
            real = mask[:, start:stop].bool()
            torch.testing.assert_close(logits[real], expected[:, start:stop][real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_the_rounding_of_dense_attention(dtype):
    model, exact = make_model("llama", dtype), make_model("llama")
    exact.load_state_dict(model.state_dict())
    ids, _ = prompts(1, 75)
    plan = random_plan(model.config)
    expected = masked_logits(exact, plan, ids)
    rounding = (masked_logits(model, plan, ids).float() - expected).abs().max()
    cache = RedKnotCache(model.config, plan, page_size=16)
    with torch.no_grad():
        parts = [model(ids[:, a:b], **cache_argument(model, cache)).logits for a, b in [(0, 40), (40, 41), (41, 75)]]
    assert (torch.cat(parts, 1).float() - expected).abs().max() <= 2 * rounding


@pytest.mark.parametrize(
    "options", [{"page_size": 16}, {"page_size": 64}, {"page_size": 16, "max_cache_len": 80}], ids=str
)
@pytest.mark.parametrize("padding", [(0, 0), (0, 9), (38, 9)], ids=str)
def test_layers_that_share_keys_may_be_asked_by_the_last_queries_only(padding, options):
    """From its first sharing layer on Gemma4 runs those tokens only whose logits are wanted."""
    model = make_model("gemma4")
    ids, mask = prompts(2, 60, padding=padding)
    plan = random_plan(model.config, seed=3)
    expected = masked_logits(model, plan, ids, mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for keep in (1, 2, 17, 40, 0):
        cache = RedKnotCache(model.config, plan, **options)
        with torch.no_grad():
            for start, stop in [(0, 43), (43, 51), (51, 60)]:
                logits = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    **cache_argument(model, cache),
                    logits_to_keep=keep,
                ).logits
                first = max(stop - keep, start) if keep else start
                assert logits.shape[1] == stop - first
                real = mask[:, first:stop].bool()
                torch.testing.assert_close(logits[real], expected[:, first:stop][real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prefill_chunk_size": 17}], ids=str)
@pytest.mark.parametrize("family", ["gemma4", "gemma4_ragged", "mimo_v2_flash"])
def test_beams_and_chunks_of_models_whose_layers_differ(family, how):
    model = make_model(family)
    ids, mask = prompts(2, 40, padding=(0, 9))
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **how}
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()), page_size=16)
    ours = model.generate(ids, past_key_values=cache, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(ids, past_key_values=DynamicCache(config=model.config), **options))
