"""Tiny models of every supported family, with random weights that tell positions and heads apart."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 97
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
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
    "qwen2_half_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "gemma2": ("gemma2", {"sliding_window": 12, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 12,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        {
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
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite", {"attention_multiplier": 0.2}),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
}


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> PreTrainedModel:
    """A small random model of the family, in evaluation mode."""
    model_type, differs = FAMILIES[family]
    config = CONFIG_MAPPING[model_type](**{**_COMMON, **differs, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot", dtype=dtype)
    with torch.no_grad():  # the usual initialisation is so small that attention hardly matters
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
            elif "sinks" in name:
                parameter.normal_()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def make_model_with_idle_heads() -> PreTrainedModel:
    """A Llama two of whose heads do nothing, whatever they see: 2 of layer 0, and 0 of layer 1."""
    model = make_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        for layer, head in ((0, 2), (1, 0)):
            model.model.layers[layer].self_attn.o_proj.weight[:, 32 * head : 32 * head + 32] = 0
    return model
