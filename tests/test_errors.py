"""What cannot work says so: each message names the value and what to do instead, and nothing is lost by it."""

from copy import deepcopy

import pytest
import torch
from families import VOCABULARY, make_model
from transformers import DynamicCache

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument
from redknot_hf.attention.attention import redknot_attention

IDS = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
LOCAL = HeadSpec(8, 2)


@pytest.fixture
def model():
    return make_model("llama")


def new_cache(model, spec=LOCAL, **options):
    return RedKnotCache(model.config, HeadPlan.uniform(model.config, spec), page_size=16, **options)


@torch.no_grad()
def forward(model, cache, ids=IDS, mask=None):
    return model(ids, attention_mask=mask, **cache_argument(model, cache)).logits


def slots(cache):
    return {layer.get_seq_length() for layer in cache.layers}


def assert_continues_like(model, cache, fork):
    """Both give the same logits for the same next tokens."""
    for tokens in (3, 1, 1):
        ids = IDS[:, :tokens]
        assert torch.equal(forward(model, cache, ids), forward(model, fork, ids))


@pytest.mark.parametrize("used", ["sdpa", "eager"])
def test_another_attention_implementation_is_named_and_may_still_be_switched(model, used):
    cache, expected = new_cache(model), forward(model, new_cache(model))
    model.set_attn_implementation(used)
    message = rf"attn_implementation='{used}'.*model\.set_attn_implementation\('redknot'\)"
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, past_key_values=cache, max_new_tokens=3)
    assert slots(cache) == {0}
    model.set_attn_implementation("redknot")
    assert torch.equal(forward(model, cache), expected)
    model.set_attn_implementation(used)
    with pytest.raises(ValueError, match=message):
        forward(model, cache, IDS[:, :1])
    model.set_attn_implementation("redknot")
    assert slots(cache) == {40}
    fresh = new_cache(model)
    forward(model, fresh)
    assert_continues_like(model, cache, fresh)


@pytest.mark.parametrize("other", [{"num_hidden_layers": 3}, {"num_key_value_heads": 2}], ids=str)
def test_a_plan_of_another_shape(model, other):
    plan = HeadPlan.uniform(make_model("llama", **other).config, LOCAL)
    shape = f"{len(plan)} layers x {len(plan[0])} KV heads"
    with pytest.raises(ValueError, match=rf"plan has {shape}, the model \(llama\) has 2 layers x 4 .*: load the plan"):
        RedKnotCache(model.config, plan)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 3}, "has a layer 2 and the cache 2 layers: make the cache from model.config"),
        ({"num_key_value_heads": 2}, r"plan has 4 KV heads .* keys have 2\. Make the plan for this model"),
    ],
)
def test_a_cache_of_another_model(model, other, message):
    with pytest.raises(ValueError, match=message):
        forward(make_model("llama", **other), new_cache(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 20}, r"page_size=20: choose one of \(16, 32, 64, 128\)"),
        ({"page_size": 0}, "page_size=0: choose one of"),
        ({"max_cache_len": 0}, "max_cache_len=0: give a positive number"),
        ({"impl": "cuda"}, "impl='cuda': choose one of .*torch.*None"),
    ],
    ids=str,
)
def test_an_argument_that_is_off(model, options, message):
    with pytest.raises(ValueError, match=message):
        RedKnotCache(model.config, HeadPlan.uniform(model.config, LOCAL), **options)


@pytest.mark.parametrize("say", ["module", "argument"])
def test_two_sided_attention(say):
    config = make_model("llama").config
    module = torch.nn.Identity()
    module.is_causal = say != "module"
    handles = RedKnotCache(config, HeadPlan.uniform(config, LOCAL)).update(*torch.randn(2, 1, 4, 5, 16), 0)
    kwargs = {} if say == "module" else {"is_causal": False}
    with pytest.raises(ValueError, match=r"Identity attends both ways .* use DynamicCache"):
        redknot_attention(module, torch.randn(1, 8, 5, 16), *handles, None, **kwargs)
    with pytest.raises(ValueError, match=r"Identity adds a position bias.* use DynamicCache"):
        redknot_attention(module, torch.randn(1, 8, 5, 16), *handles, None, position_bias=torch.zeros(1, 8, 5, 5))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_that_changes(model, batch):
    cache = new_cache(model)
    forward(model, cache)
    fork = deepcopy(cache)
    with pytest.raises(ValueError, match=rf"holds 2 sequences and got keys of {batch}.*batch_repeat_interleave\(n\)"):
        forward(model, cache, IDS[:1, :1].expand(batch, -1))
    assert_continues_like(model, cache, fork)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (5, r"crop\(5\): pass the number of slots to take back as a negative number"),
        (-81, r"crop\(-81\) takes back more than the 80 slots"),
        (-60, r"crop\(-60\) reaches \d+ tokens beyond .*activate_past_recording\(\) first"),
    ],
)
def test_a_crop_that_cannot_be_made_changes_nothing(model, number, message):
    plan = HeadPlan.with_global(model.config, [(0, h) for h in range(4)], local=LOCAL)
    cache, same = (RedKnotCache(model.config, plan, page_size=16) for _ in range(2))
    for each in (cache, same):
        forward(model, each)
        forward(model, each)
    with pytest.raises(ValueError, match=message):
        cache.crop(number)
    assert slots(cache) == {80}
    assert_continues_like(model, cache, same)


def test_max_cache_len_exceeded_at_the_first_step(model):
    cache = new_cache(model, max_cache_len=30)
    with pytest.raises(
        ValueError, match=r"0 slots are used and 40 more exceed max_cache_len=30.*larger max_cache_len"
    ):
        forward(model, cache)
    forward(model, cache, IDS[:, :30])
    assert slots(cache) == {30}


def test_max_cache_len_exceeded_at_a_later_step(model):
    cache = new_cache(model, max_cache_len=45)
    message = "45 slots are used and 1 more exceed max_cache_len=45.*larger max_cache_len"
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, past_key_values=cache, max_new_tokens=9)
    assert slots(cache) == {45}
    cache.crop(-5)
    grown = new_cache(model)
    forward(model, grown)
    assert_continues_like(model, cache, grown)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, cache: model(IDS, **cache_argument(model, cache), output_attentions=True),
        lambda model, cache: model(IDS, use_cache=False, output_attentions=True),
        lambda model, cache: model.generate(
            IDS, past_key_values=cache, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
        ),
    ],
    ids=["forward", "without cache", "generate"],
)
def test_attention_weights(model, ask):
    cache = new_cache(model)
    with pytest.raises(ValueError, match=r"output_attentions=True.*attn_implementation='eager'"):
        ask(model, cache)
    assert slots(cache) == {0}


def test_attention_weights_that_the_config_asks_for(model):
    with pytest.raises(ValueError, match=r"output_attentions.*redknot.*'eager'"):
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    model.set_attn_implementation("redknot")
    with pytest.raises(ValueError, match=r"output_attentions=True.*attn_implementation='eager'"):
        forward(model, new_cache(model))


def test_dropout():
    model = make_model("llama", attention_dropout=0.5).train()
    cache = new_cache(model)
    with pytest.raises(ValueError, match=r"dropout=0\.5 .*model\.eval\(\), or train with use_cache=False"):
        forward(model, cache)
    assert slots(cache) == {0}


def test_gradients(model):
    logits = model(IDS, **cache_argument(model, new_cache(model))).logits
    with pytest.raises(RuntimeError, match="RedKnotCache: train with use_cache=False"):
        logits.sum().backward()


ONES = torch.ones(2, 41, dtype=torch.long)
PADDED = ONES.clone()
PADDED[1, :9] = 0
VISIBLE = torch.ones(2, 1, 1, 41, dtype=torch.bool)
PAST = r"start a new cache to change it"
FORM = r"give \[2, 1, 1, 41\] of bool .* or the 2-D mask"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (ONES, PADDED, rf"shows 31 of the first 40 tokens of sequence 1, .* holds 40 .*{PAST}"),
        (None, PADDED, rf"shows 31 of the first 40 tokens of sequence 1, .* holds 40 .*{PAST}"),
        (PADDED, ONES, rf"shows 40 of the first 40 tokens of sequence 1, .* holds 31 .*{PAST}"),
        (PADDED, VISIBLE, r"4-D attention mask over a cache that skipped padding.*Pass the 2-D mask"),
        (
            PADDED,
            PADDED[:, :40],
            "mask has 40 columns: give one for each of 41 slots, the 40 before .* its 1",
        ),
        (ONES, ONES[:, :1], "mask has 1 columns: give one for each of 41 slots"),
        (ONES, ONES[:1], "mask has 1 rows: give one for each of 2"),
        (ONES, VISIBLE[..., :40], rf"mask is \[2, 1, 1, 40\] of torch\.bool: {FORM}"),
        (ONES, VISIBLE.expand(2, 3, 1, 41), rf"mask is \[2, 3, 1, 41\] of torch\.bool: {FORM}"),
        (ONES, VISIBLE.expand(2, 1, 2, 41), rf"mask is \[2, 1, 2, 41\] of torch\.bool: {FORM}"),
        (ONES, VISIBLE.long(), rf"mask is \[2, 1, 1, 41\] of torch\.int64: {FORM}"),
    ],
)
def test_a_mask_that_does_not_fit_the_past(model, before, after, message):
    cache = new_cache(model)
    forward(model, cache, mask=before if before is None else before[:, :40])
    fork = deepcopy(cache)
    with pytest.raises(ValueError, match=message):
        forward(model, cache, IDS[:, :1], after)
    assert slots(cache) == {40}
    following = ONES if before is None else before
    assert torch.equal(forward(model, cache, IDS[:, :1], following), forward(model, fork, IDS[:, :1], following))


@pytest.mark.parametrize("extra", [1, 30])
def test_columns_of_slots_to_come_say_nothing_yet(model, extra):
    expected, longer = (new_cache(model) for _ in range(2))
    mask = torch.cat([PADDED, torch.zeros(2, extra, dtype=torch.long)], 1)
    assert torch.equal(forward(model, longer, mask=mask), forward(model, expected, mask=PADDED[:, :40]))
    ids = IDS[:, :1]
    assert torch.equal(forward(model, longer, ids, mask), forward(model, expected, ids, PADDED))


def test_another_cache_is_not_disturbed(model):
    with pytest.raises(ValueError, match="max_cache_len=3"):
        forward(model, new_cache(model, max_cache_len=3))
    tokens = model.generate(IDS, past_key_values=DynamicCache(config=model.config), max_new_tokens=3)
    assert torch.equal(tokens, model.generate(IDS, past_key_values=new_cache(model, HeadSpec()), max_new_tokens=3))
