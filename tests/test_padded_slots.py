"""What attention gives at padded slots, which layers that mix tokens without attention may read."""

import pytest
import torch
from families import make_model
from transformers import AutoModelForCausalLM, DynamicCache, RecurrentGemmaConfig

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

RECURRENT = RecurrentGemmaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1,
    head_dim=16, lru_width=64, vocab_size=97, attention_window_size=64,
    pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def padded(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts of 20 and 14 tokens, the second padded."""
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 6) if left else slice(14, 20)] = 0
    return ids, mask


def recurrent(attention: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RECURRENT, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("reserved", [None, 64])
def test_recurrent_layers_read_behind_left_padding_what_sdpa_gives(reserved):
    ids, mask = padded(left=True)
    want = recurrent("sdpa")(ids, attention_mask=mask, use_cache=False).logits
    model = recurrent("redknot")
    cache = RedKnotCache(RECURRENT, HeadPlan.uniform(RECURRENT, HeadSpec()), page_size=16, max_cache_len=reserved)
    found = model(ids, attention_mask=mask, **cache_argument(model, cache)).logits
    torch.testing.assert_close(found[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_real_slots_before_right_padding_are_dense(family):
    model, (ids, mask) = make_model(family), padded(left=False)
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()), page_size=16)
    found = model(ids, attention_mask=mask, **cache_argument(model, cache)).logits
    model.set_attn_implementation("eager")
    dense = DynamicCache(config=model.config)
    want = model(ids, attention_mask=mask, **cache_argument(model, dense)).logits
    torch.testing.assert_close(found[mask.bool()], want[mask.bool()], atol=2e-4, rtol=1e-3)
