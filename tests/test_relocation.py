"""Moved keys are held against keys that the model itself computes at the target positions."""

import pytest
import torch
import transformers
from families import FAMILIES, make_model
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from redknot_hf import cache_argument
from redknot_hf.reuse.relocation import Relocation

pytestmark = pytest.mark.core

POSITIONS = torch.tensor([0, 1, 63, 700, 30_000, 131_000])
TARGETS = torch.tensor([131_071, 90_001, 63, 20_011, 5, 131_001])
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
    "yarn": YARN,
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}
TINY = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(model_type, **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**TINY, **overrides})).eval()


@torch.no_grad()
def computed(model, positions, token=40):
    """Keys of every layer for one token, alone in its sequence, at each position: `[heads, positions, dim]`."""
    cache = DynamicCache(config=model.config)
    ids = torch.full((len(positions), 1), token)
    model(ids, attention_mask=torch.ones_like(ids), position_ids=positions[:, None], **cache_argument(model, cache))
    return [layer.keys[:, :, 0].transpose(0, 1) for layer in cache.layers if layer.keys is not None]


def assert_moves(model, positions=POSITIONS, targets=TARGETS, error=1e-5):
    relocation = Relocation.of(model)
    for layer, (stored, wanted) in enumerate(zip(computed(model, positions), computed(model, targets), strict=True)):
        moved = relocation.rerotate(stored, layer, positions, targets)
        assert moved.dtype == stored.dtype
        off = (moved.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
        assert off.max() <= error
    return relocation


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_every_family_move_to_128k(family):
    assert_moves(make_model(family, max_position_embeddings=131_072))


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_embeddings(kind):
    model = make_model("llama", rope_parameters=SCALINGS[kind], max_position_embeddings=131_072)
    if kind == "longrope":
        assert model.model.rotary_emb.attention_scaling > 1.1
        assert assert_moves(model, POSITIONS[:4], torch.tensor([4095, 17, 3000, 1])).limit == 4096
    else:
        assert assert_moves(model, POSITIONS, TARGETS - 1).limit == (131_071 if kind == "dynamic" else None)


def test_phi3_switches_tables_at_its_first_length():
    short = {**LONGROPE, "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [2.0, 4.0, 8.0, 16.0]}
    options = {"rope_parameters": {**short, "partial_rotary_factor": 0.5}, "original_max_position_embeddings": 4096}
    model = make_model("phi3", hidden_size=128, max_position_embeddings=131_072, **options)
    assert assert_moves(model, POSITIONS[:4], torch.tensor([4095, 17, 3000, 1])).limit == 4096


@pytest.mark.parametrize(
    ("model_type", "options", "layout"),
    [
        ("cohere", {}, "16 dimensions, interleaved"),
        ("gpt_neox", {"rotary_pct": 0.25}, "4 dimensions, halves"),
        ("stablelm", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}, "8 dimensions, halves"),
        ("cohere2", {"sliding_window": 8, "num_hidden_layers": 4}, "1 layers none"),
    ],
)
def test_other_layouts(model_type, options, layout):
    assert layout in repr(assert_moves(tiny(model_type, **options)))


def test_each_layer_of_gemma3_turns_at_its_own_speed():
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": SCALINGS["linear"]}
    relocation = assert_moves(make_model("gemma3", max_position_embeddings=131_072, rope_parameters=ropes))
    assert [layer.kind for layer in relocation.layers] == ["default", "default", "linear", "default"]
    first, second, third, fourth = (layer.frequencies for layer in relocation.layers)
    assert torch.equal(first, second)
    assert torch.equal(first, fourth)
    assert not torch.equal(first, third)
    turns = relocation.rotations(POSITIONS, TARGETS)
    assert turns[0] is turns[1] is turns[3] is not turns[2]


def test_layers_without_positions_stay():
    relocation = Relocation.of(make_model("smollm3"))
    keys = torch.randn(2, 6, 16)
    assert relocation.layers[1] is None
    assert relocation.rotations(POSITIONS, TARGETS)[1] is None
    assert relocation.rerotate(keys, 1, POSITIONS, TARGETS) is keys
    assert not torch.equal(relocation.rerotate(keys, 0, POSITIONS, TARGETS), keys)


@pytest.mark.parametrize("family", ["llama", "glm4", "gpt_oss"])
def test_in_bfloat16_only_the_roundings_show(family):
    model = make_model(family, max_position_embeddings=131_072)
    relocation = Relocation.of(model)
    stored, wanted = computed(model, POSITIONS)[0], computed(model, TARGETS)[0]
    once = relocation.rerotate(stored.bfloat16(), 0, POSITIONS, TARGETS)
    assert (once - wanted).norm() <= 2.5e-3 * wanted.norm()
    still = relocation.rerotate(once, 0, TARGETS, TARGETS)
    assert torch.equal(still, once)  # by no angle, to the bit
    half = make_model(family, torch.bfloat16, max_position_embeddings=131_072)
    assert repr(Relocation.of(half)) == repr(relocation)


def test_sequences_of_a_batch_may_move_differently():
    relocation, keys = Relocation.of(make_model("glm4")), torch.randn(2, 4, 3, 16)
    positions = torch.arange(3).expand(2, 3)
    targets = positions + torch.tensor([[7], [90]])
    moved = relocation.rerotate(keys, 0, positions, targets)
    for b in range(2):
        assert torch.equal(moved[b], relocation.rerotate(keys[b], 0, positions[b], targets[b]))


@pytest.mark.parametrize(("kind", "limit"), [("dynamic", 4095), ("longrope", 4096)])
def test_no_key_crosses_to_where_the_angles_depend_on_the_length(kind, limit):
    model = make_model("llama", rope_parameters=SCALINGS[kind], max_position_embeddings=4096)
    here, there = torch.tensor([limit - 1]), torch.tensor([limit])
    with torch.no_grad():  # a long sequence leaves other frequencies behind
        model(torch.tensor([[5]]), position_ids=torch.tensor([[6000]]))
    relocation = assert_moves(model, torch.tensor([3, 4000]), torch.tensor([4000, 77]))
    assert relocation.rerotate(torch.randn(1, 16), 0, here, here).isfinite().all()
    for positions, targets in ((here, there), (there, here)):
        with pytest.raises(ValueError, match=f"position {limit} with {kind}.*from {limit:,} on"):
            relocation.rerotate(torch.randn(1, 16), 0, positions, targets)


def unknown_layout():
    """A Llama in whose second layer the frequencies go to other dimensions than in any model."""
    model = tiny("llama")
    forward = model.model.layers[1].self_attn.forward
    shuffled = lambda *a, position_embeddings, **k: forward(  # noqa: E731
        *a, position_embeddings=tuple(x.roll(1, -1) for x in position_embeddings), **k
    )
    model.model.layers[1].self_attn.forward = shuffled
    return model


MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
REFUSED = {
    "mla": (lambda: tiny("deepseek_v3", **MLA, num_key_value_heads=4), r"deepseek_v3: .*latents \(MLA"),
    "alibi": (lambda: tiny("falcon", alibi=True), "falcon: .*ALiBi"),
    "only alibi": (lambda: tiny("bloom"), "bloom: .*no rotary module"),
    "learned": (lambda: tiny("gpt2", n_embd=64, n_head=4, n_layer=2), "gpt2: .*learned embeddings"),
    "recurrent": (lambda: tiny("lfm2", layer_types=["conv", "full_attention"]), "lfm2: .*layer 0 keeps its past in"),
    "unknown": (unknown_layout, "llama: .* in layer 1, 0 of 3 known layouts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_moved_is_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Relocation.of(make())


def test_multimodal_positions_are_refused():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config={**TINY, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"qwen2_vl_text: .*mRoPE"):
        Relocation.of(transformers.Qwen2VLForConditionalGeneration(config))


def test_training_mode_comes_back():
    model = make_model("llama").train()
    Relocation.of(model)
    assert model.training
