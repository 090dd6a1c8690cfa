"""The attention function without a RedKnotCache is ordinary attention."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, make_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LENGTH = 30  # beyond the sliding windows of the families, which are 12
IDS = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :7] = 0
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic without config": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config, max_cache_len=LENGTH + 20),
}


@torch.no_grad()
def logits(model, implementation, mask=None):
    """Logits of the real tokens."""
    model.set_attn_implementation(implementation)
    found = model(IDS, attention_mask=mask, use_cache=False).logits
    return found if mask is None else found[mask.bool()]


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_a_cache_are_those_of_eager(family, mask):
    model = make_model(family)
    torch.testing.assert_close(logits(model, "redknot", mask), logits(model, "eager", mask), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_other_caches_are_those_of_eager(family):
    model = make_model(family)
    options = {"attention_mask": MASK, "max_new_tokens": 20, "do_sample": False}
    found = [model.generate(IDS, past_key_values=new(model.config), **options) for new in CACHES.values()]
    model.set_attn_implementation("eager")
    expected = model.generate(IDS, past_key_values=DynamicCache(config=model.config), **options)
    for name, tokens in zip(CACHES, found, strict=True):
        assert torch.equal(tokens, expected), name


# Models that tell their local pattern to the mask function only, and not to the attention function.
SILENT = {
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 2,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "phimoe": {"sliding_window": 12, "num_local_experts": 4},
    "llama4_text": {"attention_chunk_size": 12, "intermediate_size_mlp": 48, "num_local_experts": 2},
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("model_type", SILENT)
def test_a_pattern_that_only_the_mask_knows_is_kept(model_type, mask):
    sizes = make_model("llama").config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    common = {name: getattr(sizes, name) for name in names} | {"vocab_size": VOCABULARY, "head_dim": 8}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**common | special | SILENT[model_type])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, 0, 1.2 / parameter.shape[-1] ** 0.5)
    torch.testing.assert_close(logits(model, "redknot", mask), logits(model, "eager", mask), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_half_sliding", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_eager(family):
    model = make_model(family)
    labels = IDS.masked_fill(MASK.roll(1, 1) * MASK == 0, -100)  # nothing is learnt from what padding says
    gradients = []
    for implementation in ("redknot", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(IDS, attention_mask=MASK, labels=labels, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_attention_dropout_follows_the_seed_and_training_only(family):
    model = make_model(family, attention_dropout=0.5)

    def forward(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(IDS, use_cache=False).logits

    still = forward(0)
    assert torch.equal(still, forward(1))
    model.train()
    assert torch.equal(forward(0), forward(0))
    assert not torch.allclose(forward(0), forward(1))
    assert not torch.allclose(forward(0), still)
