"""The mask function says as little as possible: nothing, which slots are padding, or the whole matrix."""

import numpy as np
import pytest
import torch
from families import make_model
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    sdpa_mask,
)

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument
from redknot_hf.attention.mask import PaddingMask, redknot_mask
from redknot_hf.cache.argument import OF_GENERATE

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "attn_implementation": "redknot"}
LLAMA = LlamaConfig(**SIZES)
MISTRAL = MistralConfig(**SIZES, sliding_window=4)
CHUNKED = LlamaConfig(**SIZES, attention_chunk_size=4)
EMBEDS = torch.zeros(2, 6, 8)
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
CACHES = {
    "none": lambda: None,
    "redknot": lambda: RedKnotCache(LLAMA, HeadPlan.uniform(LLAMA, HeadSpec())),
    "dynamic": lambda: DynamicCache(config=LLAMA),
}


@pytest.mark.parametrize("cache", CACHES)
def test_no_mask_is_one_element_that_says_all(cache):
    mask = create_causal_mask(LLAMA, EMBEDS, None, CACHES[cache]())
    assert type(mask) is PaddingMask
    assert mask.whole
    assert mask.plain().untyped_storage().nbytes() == 1
    assert mask.plain().shape == (2, 1, 1, 6)
    assert mask.plain().all()
    assert mask.new_tokens(0, 6, np.array([0, 0])) is None
    with pytest.raises(ValueError, match=r"shows 3 of the first 3 tokens of sequence 1.*holds 1 of them"):
        mask.new_tokens(3, 3, np.array([3, 1]))


@pytest.mark.parametrize(
    "use", [lambda m: m + torch.zeros(1), lambda m: m.masked_fill(m, 0), lambda m: torch.where(m, 1, 0), lambda m: ~m]
)
@pytest.mark.parametrize("given", [None, PADDED])
def test_a_model_that_computes_with_the_mask_is_told_off(use, given):
    mask = create_causal_mask(LLAMA, EMBEDS, given, None)
    with pytest.raises(RuntimeError, match=r"was called on the attention mask.*use DynamicCache"):
        use(mask)


def test_a_model_outside_of_the_interface_does_not_see_the_future_in_silence():
    config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=32)
    model = BloomForCausalLM(config)
    model.config._attn_implementation = "redknot"
    with pytest.raises(RuntimeError, match="use DynamicCache"):
        model(torch.tensor([[1, 2, 3]]), use_cache=False)


@pytest.mark.parametrize("cache", CACHES)
def test_padding_stays_a_row_of_flags(cache):
    mask = create_causal_mask(LLAMA, EMBEDS, PADDED, CACHES[cache]())
    assert type(mask) is PaddingMask
    assert type(mask.plain()) is torch.Tensor
    assert mask.window is None
    assert torch.equal(mask.plain(), PADDED.bool()[:, None, None])


def packed(config, **more):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)
    return {"config": config, "attention_mask": None, OF_GENERATE: None, "position_ids": positions} | more


def overlay(config, **more):
    return {"config": config, "attention_mask": PADDED, OF_GENERATE: None} | more


def near(batch, head, query, key):
    return (query - key).abs() < 2


PATTERNS = {
    "packed": (create_causal_mask, packed(LLAMA)),
    "packed sliding": (create_sliding_window_causal_mask, packed(MISTRAL)),
    "or": (create_causal_mask, overlay(LLAMA, or_mask_function=near)),
    "and": (create_causal_mask, overlay(LLAMA, and_mask_function=near)),
    "or sliding": (create_sliding_window_causal_mask, overlay(MISTRAL, or_mask_function=near)),
    "blocks": (create_causal_mask, overlay(LLAMA, block_sequence_ids=torch.tensor([[-1, 0, 0, 1, 1, -1]] * 2))),
    "chunks": (create_chunked_causal_mask, overlay(CHUNKED)),
    "chunks without padding": (create_chunked_causal_mask, overlay(CHUNKED, attention_mask=None)),
    "asked for": (create_causal_mask, overlay(LLAMA, allow_is_causal_skip=False)),
    "static cache": (create_causal_mask, overlay(LLAMA, **{OF_GENERATE: StaticCache(LLAMA, max_cache_len=9)})),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_other_patterns_are_the_matrix_of_sdpa(pattern):
    create, options = PATTERNS[pattern]
    mask = create(inputs_embeds=EMBEDS, **options)
    config = type(options["config"])(**options["config"].to_diff_dict() | {"attn_implementation": "sdpa"})
    expected = create(inputs_embeds=EMBEDS, **options | {"config": config})
    assert type(mask) is torch.Tensor
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)


def test_static_cache_without_padding_gets_the_matrix():
    mask = create_causal_mask(LLAMA, EMBEDS, None, StaticCache(LLAMA, max_cache_len=9))
    assert torch.equal(mask, sdpa_mask(2, 6, 9, allow_is_causal_skip=False))


@pytest.mark.parametrize(("length", "window"), [(3, None), (4, None), (5, 4), (6, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_sliding_window_is_said_where_it_hides_something(length, window, padded):
    attention_mask = PADDED[:, -length:] if padded else None
    mask = create_sliding_window_causal_mask(MISTRAL, EMBEDS[:, :length], attention_mask, None)
    assert type(mask) is PaddingMask
    assert mask.window == window
    assert torch.equal(mask.plain()[:, 0, 0], attention_mask.bool() if padded else torch.ones(2, length).bool())


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_a_padding_mask_survives_a_second_pass(create):
    mask = create(MISTRAL, EMBEDS, PADDED, None)
    assert create(MISTRAL, EMBEDS, mask, None) is mask


@pytest.mark.parametrize(
    "derive",
    [
        lambda mask: mask[:, :, :, :5],
        lambda mask: mask[:1],
        lambda mask: mask.to("meta"),
        lambda mask: mask.to(device="cpu", dtype=torch.bool),
        lambda mask: mask.clone().contiguous(),
        lambda mask: mask.repeat_interleave(2, 0),
    ],
)
def test_what_is_derived_from_a_padding_mask_stays_one(derive):
    mask = derive(create_sliding_window_causal_mask(MISTRAL, EMBEDS, PADDED, None))
    assert type(mask) is PaddingMask
    assert mask.window == 4


def test_the_columns_are_the_slots_of_the_keys():
    long = torch.cat([PADDED, PADDED], 1).bool()
    mask = redknot_mask(2, 2, 5, q_offset=6, kv_offset=3, attention_mask=long)
    assert torch.equal(mask.plain()[:, 0, 0], long[:, 3:8])


@pytest.mark.parametrize("shape", [(1, 6), (3, 6)])
def test_a_mask_of_another_batch_is_refused(shape):
    with pytest.raises(ValueError, match=rf"attention mask has {shape[0]} rows: give one for each of 2"):
        create_causal_mask(LLAMA, EMBEDS, torch.ones(shape), None)


def test_a_mask_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"attention mask has 4 columns: give one for each of 6 slots, the 0 before"):
        create_causal_mask(LLAMA, EMBEDS, PADDED[:, :4], CACHES["redknot"]())


def make(flags):
    return torch.tensor(flags, dtype=torch.bool)[:, None, None].as_subclass(PaddingMask)


def test_new_tokens_are_read_once_for_all_layers(monkeypatch):
    mask = make([[1, 1, 1, 1], [0, 1, 0, 1]])
    first = mask.new_tokens(2, 2, np.array([2, 1]))
    assert first.tolist() == [[True, True], [False, True]]
    with monkeypatch.context() as patch:
        patch.setattr(PaddingMask, "plain", lambda self: pytest.fail("the mask was read again"))
        assert mask.new_tokens(2, 2, np.array([2, 1])) is first
    assert mask.new_tokens(3, 1, np.array([3, 1])) is None  # another step, whose tokens are all real


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2, 2], r"shows 1 of the first 2 tokens of sequence 1, and the cache holds 2 .* start a new cache"),
        ([1, 1], r"shows 2 of the first 2 tokens of sequence 0, and the cache holds 1 .* start a new cache"),
    ],
)
def test_new_tokens_refuse_a_past_that_changed(lengths, message):
    with pytest.raises(ValueError, match=message):
        make([[1, 1, 1, 1], [0, 1, 0, 1]]).new_tokens(2, 2, np.array(lengths))


def test_generate_makes_one_padding_mask_for_a_forward_pass(monkeypatch):
    model, seen = make_model("llama"), []
    real = PaddingMask.new_tokens
    monkeypatch.setattr(PaddingMask, "new_tokens", lambda self, *args: seen.append(id(self)) or real(self, *args))
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()))
    with torch.no_grad():
        model(torch.randint(3, 90, (2, 6)), attention_mask=PADDED, **cache_argument(model, cache))
    assert len(seen) == len(model.model.layers)
    assert len(set(seen)) == 1


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("given", [None, PADDED.repeat(1, 2).bool()], ids=["no mask", "padded"])
def test_a_pattern_in_a_step_that_may_be_captured_is_told_of_all_slots(given, vmap):
    """Such a step is asked for its own slots only; flags of these would drop the pattern without a word."""
    both_ways = or_masks(causal_mask_function, lambda b, h, q, k: (q >= 9) & (k >= 9))
    options = {"mask_function": both_ways, "attention_mask": given, "allow_is_causal_skip": False, "use_vmap": vmap}
    found = redknot_mask(2, 5, 5, q_offset=7, kv_offset=7, **options)
    assert torch.equal(found, sdpa_mask(2, 5, 12, q_offset=7, **options))
    one = redknot_mask(2, 1, 1, q_offset=11, kv_offset=11, **options | {"use_vmap": False})
    assert one.shape == (2, 1, 1, 1)  # the last token sees all that came before it, whatever the overlay says
