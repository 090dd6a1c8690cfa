"""Models that cannot be served say so before any text is read."""

import pytest
import torch
from families import VOCABULARY
from transformers import AutoModelForCausalLM, DeepseekV3Config, Llama4TextConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

IDS = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


LOCAL = HeadSpec(8, 2)


@torch.no_grad()
def forward(model, cache, ids=IDS, mask=None):
    return model(ids, attention_mask=mask, **cache_argument(model, cache)).logits


def slots(cache):
    return {layer.get_seq_length() for layer in cache.layers}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DeepseekV3Config, r"deepseek_v3 caches latents \(MLA, kv_lora_rank=512\).*Use DynamicCache"),
        (Llama4TextConfig, "llama4_text attends in chunks of 8192 tokens.*Use DynamicCache"),
    ],
    ids=["MLA", "chunks"],
)
def test_a_model_that_cannot_be_served(config, message):
    config = config(num_hidden_layers=2)
    with pytest.raises(ValueError, match=message):
        RedKnotCache(config, HeadPlan.uniform(config, LOCAL))


BYPASSING = {
    "falcon": {"num_attention_heads": 4, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon alibi": {"num_attention_heads": 4, "alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "bloom": {"n_head": 4},
}


@pytest.mark.parametrize("name", BYPASSING)
def test_a_model_that_bypasses_the_attention_interface(name):
    make = CONFIG_MAPPING[name.split()[0]]
    configs = [make(hidden_size=64, num_hidden_layers=2, vocab_size=97, **BYPASSING[name]) for _ in range(2)]
    model = AutoModelForCausalLM.from_config(configs[0]).eval()
    model.set_attn_implementation("redknot")  # transformers only warns that it cannot
    known, other = (RedKnotCache(config, HeadPlan.uniform(config, HeadSpec())) for config in configs)
    with pytest.raises(ValueError, match=r"attn_implementation='(sdpa|eager)'.* use DynamicCache"):
        forward(model, known)
    with pytest.raises(
        RuntimeError, match=r"(scaled_dot_product_attention|reshape) was called .* outside of .* use DynamicCache"
    ):
        forward(model, other)
    assert slots(known) == slots(other) == {0}
