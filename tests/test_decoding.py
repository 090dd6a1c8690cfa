"""The loop of captured decoding gives `generate`'s tokens; `test_gpu.py` holds the graphs themselves to that."""

import pytest
import torch
from families import VOCABULARY, make_model

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, captured_decoding, decoding

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def prompts():
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :9], mask[1, :9] = 0, 0
    return ids, mask


def new_cache(model, slots=90):
    plan = HeadPlan.with_global(model.config, [(0, 0), (1, 1)], local=HeadSpec(window=20, sink=2))
    return RedKnotCache(model.config, plan, page_size=16, max_cache_len=slots)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": False, "prefill_chunk_size": 17},
    ],
    ids=str,
)
def test_tokens_are_those_of_generate(model, options):
    ids, mask = prompts()
    found = []
    for how in ({}, {"custom_generate": captured_decoding}):
        torch.manual_seed(0)
        cache = new_cache(model)
        found.append(
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=37, **options, **how)
        )
        assert cache.get_seq_length() == 76
    assert torch.equal(*found)


def test_ended_sequences_are_padded_and_the_rest_is_taken_back(model):
    ids, mask = prompts()
    free = model.generate(ids, attention_mask=mask, past_key_values=new_cache(model), max_new_tokens=37)
    ends = [int(free[0, 44]), int(free[1, 52])]
    caches = new_cache(model), new_cache(model)
    options = {"attention_mask": mask, "max_new_tokens": 37, "eos_token_id": ends, "pad_token_id": 0}
    expected = model.generate(ids, past_key_values=caches[0], **options)
    ours = model.generate(ids, past_key_values=caches[1], custom_generate=captured_decoding, **options)
    assert torch.equal(ours, expected)
    assert expected.shape[1] < 77
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_turns_go_on(model):
    ids = prompts()[0][:1]
    cache, plain = new_cache(model, 200), new_cache(model, 200)
    options = {"max_new_tokens": 20, "return_dict_in_generate": True}
    first = model.generate(ids, past_key_values=cache, custom_generate=captured_decoding, **options).sequences
    assert torch.equal(first, model.generate(ids, past_key_values=plain, **options).sequences)
    more = torch.cat([first, ids[:, :7]], 1)
    second = model.generate(more, past_key_values=cache, custom_generate=captured_decoding, **options).sequences
    assert torch.equal(second, model.generate(more, past_key_values=plain, **options).sequences)


@pytest.mark.parametrize(
    ("slots", "options", "message"),
    [
        (None, {}, "needs past_key_values=RedKnotCache"),
        (45, {}, "40 slots of prompt and 37 new tokens exceed max_cache_len=45"),
        (90, {"num_beams": 2}, "leave custom_generate out for beams"),
        (90, {"output_scores": True, "return_dict_in_generate": True}, "leave custom_generate out for beams, scores"),
        (90, {"max_time": 9.0}, "MaxTimeCriteria.*leave custom_generate out"),
    ],
)
def test_what_it_cannot_do_is_refused_before_work(model, slots, options, message):
    cache = new_cache(model, slots)
    ids, mask = prompts()
    with pytest.raises(ValueError, match=message):
        model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=37, custom_generate=captured_decoding,
            **options,
        )  # fmt: skip
    assert cache.get_seq_length() == 0


def test_each_device_has_one_stream_to_capture_on(monkeypatch):
    """What torch takes by itself belongs to the device on which the first graph was captured."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    first, second = (torch.device("cuda", i) for i in range(2))
    decoding.capture_stream.cache_clear()
    streams = [decoding.capture_stream(device) for device in (first, second, first, second)]
    decoding.capture_stream.cache_clear()
    assert made == [first, second]
    assert streams[0] is streams[2] is not streams[1] is streams[3]
