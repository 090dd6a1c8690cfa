"""Attention is the same with a cache and without one, and a handle may be attended more than once."""

import pytest
import torch
from families import make_model

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache
from redknot_hf.attention.attention import attention_options, redknot_attention
from redknot_hf.attention.mask import PaddingMask

MODULE = torch.nn.Identity()


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


def test_what_is_not_said_of_attention_is_the_default():
    query, sinks = random_step(3)[0], torch.ones(2)
    assert attention_options(query, None, {"dropout": 0.0}) == {"scale": 0.25, "softcap": None, "s_aux": None}
    asked = {"softcap": 30.0, "s_aux": sinks}
    assert attention_options(query, 0.5, asked) == {"scale": 0.5, "softcap": 30.0, "s_aux": sinks}
