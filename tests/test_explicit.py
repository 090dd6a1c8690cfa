"""Masks of four dimensions: what was padding is learnt from them, and flags may follow them, or they flags."""

import pytest
import torch
from families import VOCABULARY, make_model, make_vision_model
from oracle import masked_logits, random_plan, under_plan
from transformers import DynamicCache

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument


def everything(config):
    return HeadPlan.uniform(config, HeadSpec())


OPTIONS = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
OPTIONS["suppress_tokens"] = [90, 91, 92]  # no answer holds an image
TYPES = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}


def asked(family, images, padding):
    """What a processor makes: ids and mask, padded on the left, and types of tokens; 4 tokens of each image."""
    ids = torch.randint(3, 80, (len(padding), 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) >= torch.tensor(padding)[:, None]).long()
    types = torch.zeros_like(ids)
    for row in images:
        types[row, 20:24] = 1
    ids[mask == 0] = 0
    made = {"input_ids": ids, "attention_mask": mask, TYPES[family]: types}
    if images and family == "gemma3":  # Gemma4 is told of images by their types alone, and its text stands for them
        ids[types == 1] = 90
        generator = torch.Generator().manual_seed(2)
        made["pixel_values"] = torch.randn(len(images), 3, 28, 28, generator=generator)
    return made


def generate_dense(model, plan, given, **options):
    if not all(spec.is_global for layer in plan for spec in layer):
        with under_plan(model, plan):
            return model.generate(**given, use_cache=False, **OPTIONS | options | {"prefill_chunk_size": None})
    model.set_attn_implementation("eager")
    try:
        return model.generate(**given, past_key_values=DynamicCache(config=model.config), **OPTIONS | options)
    finally:
        model.set_attn_implementation("redknot")


HOW = {
    "greedy": ({}, {}),
    "beams": ({"num_beams": 3}, {}),
    "chunks": ({"prefill_chunk_size": 9}, {}),
    "reserved": ({}, {"max_cache_len": 48}),
}
TWO, ONE = (0, 9), (9,)
CASES = [
    ((), TWO, "chunks"),
    ((), ONE, "greedy"),
    ((1,), TWO, "greedy"),
    ((0,), TWO, "beams"),
    ((0,), ONE, "reserved"),
]


@pytest.mark.parametrize(
    ("images", "padding", "how", "make_plan"),
    [(*case, random_plan) for case in CASES] + [((), TWO, "greedy", everything), ((0,), TWO, "greedy", everything)],
)
@pytest.mark.parametrize("family", TYPES)
def test_prompts_of_models_that_see(family, images, padding, how, make_plan):
    model = make_vision_model(family)
    plan, given = make_plan(model.config), asked(family, images, padding)
    options, cache_options = HOW[how]
    cache = RedKnotCache(model.config, plan, page_size=16, **cache_options)
    ours = model.generate(**given, past_key_values=cache, **OPTIONS | options)
    dense = generate_dense(model, plan, given, **options)
    assert torch.equal(ours.sequences, dense.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(dense.logits), atol=2e-4, rtol=1e-4)


def test_chunks_with_an_image_in_a_reserved_cache_that_may_be_captured():
    """A step of at most a page may be captured, and then is told of its own tokens only; an overlay is told of all."""
    pytest.importorskip("triton")
    model = make_vision_model("gemma3")
    plan, given = random_plan(model.config), asked("gemma3", (), TWO)
    ids, mask, types = given["input_ids"], given["attention_mask"], given["token_type_ids"]
    types[:, 20:24] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = RedKnotCache(model.config, plan, page_size=16, max_cache_len=48, impl="triton")
    with torch.no_grad():
        for a, b in ((0, 10), (10, 18), (18, 33)):
            part = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b], "token_type_ids": types[:, :b]}
            ours = model(ids[:, a:b], **part, **cache_argument(model, cache)).logits
        with under_plan(model, plan):
            part = {"attention_mask": mask[:, :33], "position_ids": positions[:, :33], "token_type_ids": types[:, :33]}
            dense = model(ids[:, :33], **part, use_cache=False).logits[:, 18:]
    torch.testing.assert_close(ours, dense, atol=2e-4, rtol=1e-4)


def texts(batch, tokens):
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


def matrix(flags, kind):
    """The causal mask of padded sequences, four-dimensional."""
    shown = torch.ones(flags.shape[1], flags.shape[1], dtype=torch.bool).tril() & flags[:, None, None].bool()
    return {
        "bool": shown,
        "lowest": torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min),
        "infinite": torch.zeros(shown.shape).masked_fill(~shown, -torch.inf),
        "-1e9": torch.zeros(shown.shape).masked_fill(~shown, -1e9),
    }[kind]


STEPS = [(0, 37), (37, 47), (47, 48), (48, 70), (70, 71)]


@pytest.mark.parametrize(
    ("order", "kind"),
    [("FFffF", "bool"), ("FffFf", "lowest"), ("fFfFF", "bool"), ("fFfFF", "infinite"), ("FFFFF", "-1e9")],
)
@pytest.mark.parametrize("padding", [TWO, ONE], ids=str)
def test_matrices_and_flags_in_any_order(padding, order, kind):
    model = make_model("llama")
    plan, ids = random_plan(model.config), texts(len(padding), 71)
    flags = (torch.arange(71) >= torch.tensor(padding)[:, None]).long()
    whole, positions = matrix(flags, kind), (flags.cumsum(-1) - 1).clamp(min=0)
    cache = RedKnotCache(model.config, plan, page_size=16)
    found = []
    with torch.no_grad():
        for (a, b), form in zip(STEPS, order, strict=True):
            mask = whole[:, :, a:b, :b] if form == "F" else flags[:, :b]
            part = {"position_ids": positions[:, a:b], "attention_mask": mask}
            found.append(model(ids[:, a:b], **part, **cache_argument(model, cache)).logits)
    expected, real = masked_logits(model, plan, ids, flags), flags.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], atol=2e-4, rtol=1e-4)
    assert [layer.storage.rows.lengths.tolist() for layer in cache.layers] == [flags.sum(1).tolist()] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_masks_hide_padding_too(dtype):
    model = make_model("llama", dtype)
    ids, flags = texts(2, 40), (torch.arange(40) >= torch.tensor([0, 9])[:, None]).long()
    shown = matrix(flags, "bool")
    added = torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)
    caches = [RedKnotCache(model.config, random_plan(model.config), page_size=16) for _ in range(2)]
    with torch.no_grad():
        for cache, mask in zip(caches, (added, flags), strict=True):
            model(ids, attention_mask=mask, **cache_argument(model, cache))
        one, other = (
            model(
                ids[:, :1],
                attention_mask=torch.ones(2, 41) * flags[:, [*range(40), 39]],
                **cache_argument(model, cache),
            ).logits
            for cache in caches
        )
    torch.testing.assert_close(one, other, atol=0.1, rtol=0.05)


def test_a_matrix_follows_when_padded_sequences_are_gone():
    model = make_model("llama")
    plan, ids = random_plan(model.config), texts(2, 41)
    flags = (torch.arange(40) >= torch.tensor([0, 9])[:, None]).long()
    cache, alone = (RedKnotCache(model.config, plan, page_size=16) for _ in range(2))
    with torch.no_grad():
        model(ids[:, :40], attention_mask=flags, **cache_argument(model, cache))
        cache.batch_select_indices(torch.tensor([0]))
        model(ids[:1, :40], **cache_argument(model, alone))
        ours, expected = (
            model(
                ids[:1, 40:], attention_mask=torch.ones(1, 1, 1, 41, dtype=torch.bool), **cache_argument(model, c)
            ).logits
            for c in (cache, alone)
        )
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_beams_and_crops_keep_what_was_learnt():
    model = make_model("llama")
    plan, ids = random_plan(model.config), texts(2, 40)
    flags = (torch.arange(40) >= torch.tensor([0, 9])[:, None]).long()
    whole = matrix(flags, "bool")
    cache = RedKnotCache(model.config, plan, page_size=16)
    with torch.no_grad():
        model(ids[:, :38], attention_mask=whole[:, :, :38, :38], **cache_argument(model, cache))
        model(ids[:, 38:], attention_mask=flags, **cache_argument(model, cache))
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        found = model(
            ids.flip(0)[:, 38:], attention_mask=whole.flip(0)[:, :, 38:], **cache_argument(model, cache)
        ).logits
    expected = masked_logits(model, plan, ids, flags).flip(0)[:, 38:]
    # Positions are the caller's: these count padding, which rotates queries and keys alike.
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
