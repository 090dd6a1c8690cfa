"""The attention function without a RedKnotCache is ordinary attention, and a handle may be attended more than once."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, make_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache
from redknot_hf.attention import redknot_attention
from redknot_hf.mask import PaddingMask

LENGTH = 30  # beyond the sliding windows of the families, which are 12
IDS = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :7] = 0
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic without config": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config, max_cache_len=LENGTH + 20),
}
MODULE = torch.nn.Identity()


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


def random_step(tokens, batch=2, value_dim=16):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(batch, 8, tokens, 16), (batch, 4, tokens, 16), (batch, 4, tokens, value_dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"s_aux": torch.linspace(-1, 1, 8)}], ids=str)
def test_values_may_have_another_dimension_than_keys(tokens, cached, options):
    query, key, value = random_step(tokens, value_dim=24)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.3
    if "softcap" in options:
        scores = 5 * torch.tanh(scores / 5)
    scores = scores.masked_fill(~torch.ones(tokens, tokens).tril().bool(), -torch.inf)
    if "s_aux" in options:
        scores = torch.cat([scores, options["s_aux"][None, :, None, None].expand(2, 8, tokens, 1)], -1)
    expected = (scores.softmax(-1)[..., :tokens] @ value.repeat_interleave(2, 1)).transpose(1, 2)
    if cached:
        key, value = new_cache(HeadSpec()).update(key, value, 0)
    found, weights = redknot_attention(MODULE, query, key, value, None, scaling=0.3, **options)
    assert weights is None
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def new_cache(*specs):
    config = make_model("llama").config
    return RedKnotCache(config, HeadPlan([(specs * 4)[:4]] * config.num_hidden_layers), page_size=16)


def padding(slots, start=3):
    flags = torch.ones(2, 1, 1, slots, dtype=torch.bool)
    flags[1, ..., :start] = False
    return flags.as_subclass(PaddingMask)


def matrix(slots):
    return torch.ones(2, 1, slots, slots, dtype=torch.bool).tril()[:, :, -5:]


@pytest.mark.parametrize(
    ("past", "tokens", "mask"),
    [
        (0, 5, None),
        (0, 40, None),
        (40, 1, None),
        (40, 5, None),
        (40, 33, None),
        (0, 5, padding(5)),
        (0, 40, padding(40)),
        (40, 33, padding(73)),
        (40, 5, matrix(45)),
    ],
    ids=lambda x: type(x).__name__ if x is None or isinstance(x, torch.Tensor) else str(x),
)
def test_a_handle_attended_twice_gives_the_same_and_stores_once(past, tokens, mask):
    cache, once = (new_cache(HeadSpec(), HeadSpec(7, 2)) for _ in range(2))

    def step(cache, tokens, mask, times):
        query, key, value = random_step(tokens)
        handles = cache.update(key, value, 0)
        return [redknot_attention(MODULE, query, *handles, mask)[0] for _ in range(times)]

    if past:
        before = padding(past) if isinstance(mask, PaddingMask) else None
        step(cache, past, before, 2)
        step(once, past, before, 1)
    outs = step(cache, tokens, mask, 3) + step(once, tokens, mask, 1)
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
    assert not outs[0].isnan().any()
    assert cache.get_seq_length() == once.get_seq_length() == past + tokens
    assert cache.nbytes == once.nbytes
    following = [
        step(c, 1, padding(past + tokens + 1) if type(mask) is PaddingMask else None, 1) for c in (cache, once)
    ]
    assert torch.equal(following[0][0], following[1][0])
