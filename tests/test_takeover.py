"""What would put the cache aside: the plan holds all the same, or an error says so before anything runs."""

import peft
import pytest
import torch
from families import _COMMON, VOCABULARY, make_model
from oracle import random_plan, under_plan
from transformers import AutoModelForCausalLM, DynamicCache, PhimoeConfig

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument, captured_decoding, guidance
from redknot_hf.cache.argument import OF_GENERATE
from redknot_hf.cache.takeover import call_of

pytestmark = pytest.mark.core
SWITCH = 40
OPTIONS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def rope(**more):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH, **factors, **more}


def longrope(family="phi3", dtype=torch.float32):
    if family == "phi3":
        shape = {"head_dim": 8, "partial_rotary_factor": 1.0, "original_max_position_embeddings": SWITCH}
        return make_model("phi3", dtype, rope_parameters=rope(partial_rotary_factor=1.0), **shape)
    config = PhimoeConfig(
        **_COMMON | {"head_dim": 8}, num_local_experts=2, original_max_position_embeddings=SWITCH,
        rope_parameters=rope(short_mscale=1.0, long_mscale=1.0),
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot", dtype=dtype).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def text(tokens, batch=2, padded=7):
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    ids[1:, :padded], mask[1:, :padded] = 0, 0
    return ids, mask


def dense(model, ids, **options):
    model.set_attn_implementation("eager")
    try:
        return model.generate(ids, past_key_values=DynamicCache(config=model.config), **OPTIONS, **options)
    finally:
        model.set_attn_implementation("redknot")


def assert_same(ours, theirs, atol=2e-4):
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("reserved", [None, 100])
@pytest.mark.parametrize("family", ["phi3", "phimoe"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_a_prompt_longer_than_the_switch_reaches_the_cache(family, reserved, how):
    model = longrope(family)
    ids, mask = text(45)
    options = {"attention_mask": mask, "max_new_tokens": 6, **how}
    plan = HeadPlan.uniform(model.config, HeadSpec())
    cache = RedKnotCache(model.config, plan, page_size=16, max_cache_len=reserved)
    ours = model.generate(ids, past_key_values=cache, **OPTIONS, **options)
    assert ours[OF_GENERATE] is cache
    assert cache.get_seq_length() == 50
    assert_same(ours, dense(model, ids, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("custom", [None, captured_decoding], ids=["plain", "captured"])
def test_a_local_plan_holds_beyond_the_switch(dtype, custom):
    model, ids = longrope(dtype=dtype), text(60, batch=1)[0]
    plan = random_plan(model.config)
    cache = RedKnotCache(model.config, plan, page_size=16, max_cache_len=80)
    how = {} if custom is None else {"custom_generate": custom}
    ours = model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False, **how)
    assert cache.get_seq_length() == 68
    with under_plan(model, plan), torch.no_grad():
        logits = model(ours[:, :-1], use_cache=False).logits[:, -9:].float()
    chosen = logits.gather(-1, ours[:, -9:, None])[..., 0]
    rounding = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (logits.max(-1).values - chosen).max() < rounding
    more = model.generate(ours, past_key_values=cache, max_new_tokens=4, do_sample=False)  # a turn beyond the switch
    assert more.shape[1] == 73
    assert cache.get_seq_length() == 72


@pytest.mark.parametrize("chunk", [16, 41])
def test_chunks_and_steps_by_hand_are_what_they_are_densely(chunk):
    model, (ids, mask) = longrope(), text(60)
    plan = HeadPlan.uniform(model.config, HeadSpec())
    options = {"attention_mask": mask, "max_new_tokens": 5, "prefill_chunk_size": chunk}
    cache = RedKnotCache(model.config, plan, page_size=16)
    assert_same(model.generate(ids, past_key_values=cache, **OPTIONS, **options), dense(model, ids, **options))
    parts = ids[:1].split(chunk, 1)
    with torch.no_grad():
        ours, theirs = (
            [model(part, **cache_argument(model, held)).logits for part in parts]
            for held in (RedKnotCache(model.config, plan), DynamicCache(config=model.config))
        )
    torch.testing.assert_close(torch.cat(ours, 1), torch.cat(theirs, 1), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("reserved", "how"),
    [(None, {}), (100, {}), (100, {"custom_generate": captured_decoding})],
    ids=("growing", "reserved", "captured"),
)
@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_growing_across_the_switch_is_refused_before_anything_runs(family, how, reserved):
    model, (ids, mask) = longrope(family), text(30)
    cache = RedKnotCache(model.config, random_plan(model.config), page_size=16, max_cache_len=reserved)
    with pytest.raises(ValueError, match=rf"{family} turns .* may grow by 11, and 12 are asked .* max_new_tokens"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **how)
    assert cache.get_seq_length() == 0
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=11, do_sample=False, **how)
    assert out.shape[1] == SWITCH + 1
    assert cache.get_seq_length() == SWITCH


def test_a_turn_across_the_switch_is_refused_and_the_whole_text_taken_anew():
    model, ids = longrope(), text(30, batch=1)[0]
    plan = HeadPlan.uniform(model.config, HeadSpec())
    cache = RedKnotCache(model.config, plan)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    longer = torch.cat([first, ids], 1)
    with pytest.raises(ValueError, match=r"holds 34 tokens of 65.*cache\.reset\(\)"):
        model.generate(longer, past_key_values=cache, max_new_tokens=5)
    assert cache.get_seq_length() == 34
    cache.reset()
    ours = model.generate(longer, past_key_values=cache, max_new_tokens=5, **OPTIONS)
    assert_same(ours, dense(model, longer, max_new_tokens=5))


def test_a_model_without_a_switch_is_never_asked():
    model, (ids, mask) = make_model("llama"), text(30)
    cache = RedKnotCache(model.config, random_plan(model.config))
    assert bool(cache)
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20)
    assert cache.get_seq_length() == 49
    assert call_of(None) is None


GUIDED = {"guidance_scale": 1.5, "max_new_tokens": 8}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("reserved", [None, 100])
def test_guidance_on_its_own_is_refused_under_a_local_plan_only(family, reserved):
    model, (ids, mask) = make_model(family), text(30)
    caches = [
        RedKnotCache(model.config, HeadPlan.uniform(model.config, spec), page_size=16, max_cache_len=reserved)
        for spec in (HeadSpec(8, 2), HeadSpec())
    ]
    with pytest.raises(ValueError, match=r"guidance_scale=1\.5.*redknot_hf\.guidance\(model, 1\.5"):
        model.generate(ids, attention_mask=mask, past_key_values=caches[0], **GUIDED)
    assert caches[0].get_seq_length() == 0
    ours = model.generate(ids, attention_mask=mask, past_key_values=caches[1], **OPTIONS, **GUIDED)
    assert_same(ours, dense(model, ids, attention_mask=mask, **GUIDED))


@pytest.mark.parametrize(
    ("reserved", "how"),
    [(None, {}), (100, {}), (100, {"custom_generate": captured_decoding})],
    ids=("growing", "reserved", "captured"),
)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_guidance_under_the_plan_on_both_branches(family, negative, reserved, how):
    model, (ids, mask) = make_model(family), text(30)
    plan = random_plan(model.config)
    against = {}
    if negative:
        against = dict(zip(("negative_prompt_ids", "negative_prompt_attention_mask"), text(25), strict=True))
    with under_plan(model, plan):
        wanted = model.generate(ids, attention_mask=mask, use_cache=False, do_sample=False, **GUIDED, **against)
    ours, other = (RedKnotCache(model.config, plan, page_size=16, max_cache_len=reserved) for _ in range(2))
    processor = guidance(model, 1.5, other, *against.values())
    found = model.generate(
        ids, attention_mask=mask, past_key_values=ours, logits_processor=processor, max_new_tokens=8,
        do_sample=False, **how,
    )  # fmt: skip
    assert torch.equal(found, wanted)
    assert other.get_seq_length() == (25 if negative else 1) + 7
    with pytest.raises(ValueError, match="unconditional branch holds"):
        guidance(model, 1.5, other)


def adapted(config):
    model = peft.get_peft_model(make_model("llama"), config)
    return model.eval()


by_older_name = pytest.mark.skipif(
    OF_GENERATE == "cache", reason="PEFT looks for the cache by its older name, and puts its prompt into every step"
)
peft_warns = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft


@peft_warns
@pytest.mark.parametrize("reserved", [None, 100])
@pytest.mark.parametrize("prompts", [1, 2])
def test_prefix_tuning_is_refused_with_the_reason(prompts, reserved):
    model = adapted(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    ids, mask = text(20, batch=prompts)
    cache = RedKnotCache(model.config, random_plan(model.config), max_cache_len=reserved)
    message = "PEFT's PREFIX_TUNING passes the model a DynamicCache"
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3)
    with pytest.raises(ValueError, match=message):
        cache_argument(model, cache)
    assert cache.get_seq_length() == 0
    base = model.get_base_model()
    with model.disable_adapter():
        out = base.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3)
    assert out.shape[1] == 23


@peft_warns
@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # of peft
@pytest.mark.parametrize("reserved", [None, 100])
@pytest.mark.parametrize(
    "method",
    [
        peft.LoraConfig,
        pytest.param(peft.PromptTuningConfig, marks=by_older_name),
        pytest.param(peft.PromptEncoderConfig, marks=by_older_name),
    ],
)
def test_adapters_that_pass_no_cache_of_their_own_use_ours(method, reserved):
    how = {"target_modules": ["q_proj"]} if method is peft.LoraConfig else {"num_virtual_tokens": 6}
    torch.manual_seed(0)
    model = adapted(method(task_type="CAUSAL_LM", **how))
    ids, mask = text(20)
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()), max_cache_len=reserved)
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    found = model.generate(past_key_values=cache, **options)
    assert cache.get_seq_length() >= 24
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    assert torch.equal(found, model.generate(past_key_values=DynamicCache(config=base.config), **options))


@pytest.mark.parametrize("reserved", [None, 100])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_ids_that_do_not_go_on_are_refused(family, reserved):
    model = make_model(family)
    plan = random_plan(model.config)
    ids, mask = text(30)
    asked = {"do_sample": False, "max_new_tokens": 5}
    cache = RedKnotCache(model.config, plan, max_cache_len=reserved)
    told = model.generate(ids, attention_mask=mask, past_key_values=cache, **asked)  # 34 slots: the last is not read
    for tokens in (1, 20, 34):
        with pytest.raises(ValueError, match=f"input_ids has {tokens} tokens, and the cache holds 34"):
            model.generate(told[:, :tokens], past_key_values=cache, **asked)
    assert cache.get_seq_length() == 34
    more = torch.cat([told, ids[:1, :6].expand(2, -1)], 1)
    mask = torch.cat([mask, torch.ones_like(more[:, 30:])], 1)
    whole = model.generate(more, attention_mask=mask, past_key_values=cache.fork(), **asked)
    alone = model.generate(more[:, 34:], attention_mask=mask, past_key_values=cache.fork(), **asked)
    assert torch.equal(whole[:, more.shape[1] :], alone[:, more.shape[1] - 34 :])
