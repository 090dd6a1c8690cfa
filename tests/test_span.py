"""What a cache holds, taken out, sent to another process, and put into another cache."""

import pickle

import pytest
import torch
from families import make_model
from layers import PAGE, feed, planned
from oracle import random_plan
from safetensors.torch import load, save
from texts import some_ids

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument
from redknot_hf.cache.span import Span


def received(model, cache, plan=None, **kwargs):
    """Another cache that goes on with what one held, by way of bytes."""
    other = RedKnotCache(model.config, plan or cache.plan, page_size=kwargs.pop("page_size", PAGE), **kwargs)
    other.extend(pickle.loads(pickle.dumps(cache.spans())))
    return other


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n", "gpt_oss"])
@pytest.mark.parametrize("length", [5, 90])
def test_a_cache_goes_on_with_what_another_held(family, length):
    model = make_model(family)
    cache = RedKnotCache(model.config, random_plan(model.config), page_size=PAGE)
    feed(model, cache, some_ids(2, length))
    other = received(model, cache)
    assert other.get_seq_length() == length
    for step in (1, 25, 1):
        ids = some_ids(2, step, seed=step)
        want = feed(model, cache, ids)
        torch.testing.assert_close(feed(model, other, ids), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kwargs", [{"page_size": 64}, {"max_cache_len": 70}], ids=str)
def test_padding_is_left_out_and_pages_may_differ(kwargs):
    model, cache, _ = planned()
    ids, mask = some_ids(2, 40), torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask[:, :40], **cache_argument(model, cache))
        other = received(model, cache, **kwargs)
        assert [span.tokens for span in cache.spans()] == [40, 33]
        new = some_ids(2, 20, seed=2)
        positions = mask.cumsum(-1)[:, 40:] - 1
        found, want = (
            model(new, attention_mask=mask, position_ids=positions, **cache_argument(model, held)).logits
            for held in (other, cache)
        )
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_a_span_is_its_description_and_one_tensor():
    model, cache, _ = planned(1, 60)
    (span,) = cache.spans()
    data = load(save({"data": span.data}))["data"]
    assert torch.equal(data, span.data)
    other = RedKnotCache(model.config, cache.plan, page_size=PAGE)
    other.extend([Span(span.tokens, span.layers, data)])
    assert torch.equal(other.spans()[0].data, span.data)
    assert span.nbytes < span.dense_nbytes


def test_a_crop_is_as_far_as_it_was():
    model, cache, _ = planned(1, 90)
    other = received(model, cache)
    for held in (cache, other):
        held.crop(-PAGE)
    token = some_ids(1, 1, seed=4)
    want = feed(model, cache, token)
    torch.testing.assert_close(feed(model, other, token), want, atol=1e-4, rtol=1e-4)
    again = received(model, other)
    torch.testing.assert_close(feed(model, again, token), feed(model, other, token), atol=1e-4, rtol=1e-4)


def test_a_narrower_plan_takes_less_and_a_wider_one_is_refused():
    model, cache, _ = planned(1, 90)
    narrow = HeadPlan.uniform(model.config, HeadSpec(1, 0))
    assert received(model, cache, narrow).nbytes < cache.nbytes
    with pytest.raises(ValueError, match=r"there is .* give the cache a plan that keeps no more"):
        received(model, cache, HeadPlan.uniform(model.config, HeadSpec()))


def test_what_does_not_fit_is_refused():
    model, cache, _ = planned(1, 30)
    (span,) = cache.spans()
    with pytest.raises(ValueError, match="extend an empty cache"):
        cache.extend([span])
    empty = RedKnotCache(model.config, cache.plan, max_cache_len=20)
    with pytest.raises(ValueError, match=r"up to 30 tokens.*max_cache_len=20"):
        empty.extend([span])
    with pytest.raises(ValueError, match="layers and up to"):
        RedKnotCache(model.config, cache.plan).extend([Span(30, span.layers[:1], span.data)])
    with pytest.raises(ValueError, match="holds nothing yet"):
        empty.spans()
