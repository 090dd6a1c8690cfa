"""A RedKnotCache in what stands around transformers: pipelines, hooks that move weights, adapters, and training."""

from pathlib import Path

import accelerate
import pytest
import torch
from families import make_model
from oracle import random_plan, under_plan
from peft import LoraConfig, get_peft_model
from texts import prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

TINY = Path(__file__).parents[1] / "evals" / "tiny"
OPTIONS = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
PLANS = {"global": lambda config: HeadPlan.uniform(config, HeadSpec()), "local": random_plan}
plans = pytest.mark.parametrize("make_plan", PLANS.values(), ids=PLANS)


def generate(model, plan=None):
    """Greedy tokens and logits for a padded batch; without a plan with transformers' own cache."""
    ids, mask = prompts(2, 50, (0, 9))
    cache = DynamicCache(config=model.config) if plan is None else RedKnotCache(model.config, plan, page_size=16)
    return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **OPTIONS)


def assert_same(ours, expected):
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_pipeline(local):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="redknot")
    plan = random_plan(model.config) if local else HeadPlan.uniform(model.config, HeadSpec())
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = "<bos> <doc> the code of the wooden school is 3 0 5 3 . </doc> question : where does the old baker live ?"
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "max_length": None}
    if local:
        with under_plan(model, plan):
            expected = pipe(text, use_cache=False, **options)
    else:
        expected = pipe(text, past_key_values=DynamicCache(config=model.config), **options)
    cache = RedKnotCache(model.config, plan, page_size=16)
    assert pipe(text, past_key_values=cache, **options) == expected
    assert cache.get_seq_length() == len(tokenizer(text)["input_ids"]) + 20 - 1


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model, folder):
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(rest, "cpu") | {
        f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(model.model.layers))
    }
    return accelerate.dispatch_model(model, places, offload_dir=folder, main_device="cpu", force_hooks=True)


@plans
@pytest.mark.parametrize("offload", [to_cpu, to_disk])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_weights_that_stay_elsewhere(family, offload, make_plan, tmp_path):
    model = make_model(family, tie_word_embeddings=False)
    plan = make_plan(model.config)
    expected = generate(model, plan)
    offloaded = offload(model, tmp_path)
    assert offloaded.model.layers[1].self_attn.q_proj.weight.is_meta
    assert_same(generate(offloaded, plan), expected)


# peft asks the model for an attribute that transformers has since renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@plans
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_lora(family, make_plan):
    base = make_model(family)
    plan = make_plan(base.config)
    plain = generate(base, plan)
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    ours = generate(model, plan)
    assert not torch.equal(ours.logits[0], plain.logits[0])
    if make_plan is random_plan:
        ids, mask = prompts(2, 50, (0, 9))
        with under_plan(model, plan):
            assert_same(ours, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **OPTIONS))
    else:
        model.set_attn_implementation("eager")
        assert_same(ours, generate(model))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("padding", [(0, 0), (0, 9)], ids=str)
@pytest.mark.parametrize(
    ("family", "other"), [("llama", "sdpa"), ("mistral_sliding", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")]
)
def test_training_step(family, other, padding, use_cache):
    """Without a RedKnotCache the model trains as it does with any other attention."""
    ids, mask = prompts(2, 38, padding)
    labels = ids.masked_fill(mask.cumsum(-1) <= 1, -100)  # padding does not predict the first token either
    results = []
    for attention in ("redknot", other):
        model = make_model(family).train()
        model.set_attn_implementation(attention)
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=use_cache).loss
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_no_gradient_flows_through_the_cache():
    model = make_model("llama")
    ids, _ = prompts(1, 9)
    logits = model(ids, **cache_argument(model, RedKnotCache(model.config, random_plan(model.config)))).logits
    with pytest.raises(RuntimeError, match="train with use_cache=False"):
        logits.sum().backward()
