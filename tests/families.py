"""Tiny models of every supported family, with random weights that tell positions and heads apart."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import redknot_hf  # noqa: F401 - which makes its attention known to transformers

VOCABULARY = 97
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Name of the family, then model type and what differs from the common shape.
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_sliding": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2_half_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "gemma2": ("gemma2", {"sliding_window": 12, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
        },
    ),
    "gemma4": (  # the shape of E2B and E4B: layers that share keys, and full layers with wider heads
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gemma4_ragged": (  # the shape of 26B and 31B: full layers with fewer heads, whose values are their keys
        "gemma4_text",
        {
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 32,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "mimo_v2_flash": (  # sliding layers have twice the heads that the config says, and values are narrower than keys
        "mimo_v2_flash",
        {
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention"],
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite", {"attention_multiplier": 0.2}),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
}


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> PreTrainedModel:
    """A small random model of the family, in evaluation mode."""
    model_type, differs = FAMILIES[family]
    config = CONFIG_MAPPING[model_type](**{**_COMMON, **differs, **overrides})
    torch.manual_seed(seed)
    return _told_apart(AutoModelForCausalLM.from_config(config, attn_implementation="redknot", dtype=dtype))


def _told_apart(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():  # the usual initialisation is so small that attention hardly matters
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
            elif "sinks" in name:
                parameter.normal_()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def make_vision_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A small random Gemma3 or Gemma4 that takes images, of which each is 4 tokens (90) of the text."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = CONFIG_MAPPING[FAMILIES[family][0]](**{**_COMMON, **FAMILIES[family][1]})
    if family == "gemma3":
        vision |= {"image_size": 28, "patch_size": 14}
        tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
        model_class: Any = Gemma3ForConditionalGeneration
    else:
        text.use_bidirectional_attention = "vision"
        tokens = {"image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92, "video_token_id": 93}
        config = Gemma4Config(text_config=text, audio_token_id=94, boa_token_id=95, eoa_token_index=96, **tokens)
        model_class = Gemma4ForConditionalGeneration
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation="redknot")
    return _told_apart(model)


def make_model_with_idle_heads() -> PreTrainedModel:
    """A Llama two of whose heads do nothing, whatever they see: 2 of layer 0, and 0 of layer 1."""
    model = make_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        for layer, head in ((0, 2), (1, 0)):
            model.model.layers[layer].self_attn.o_proj.weight[:, 32 * head : 32 * head + 32] = 0
    return model
