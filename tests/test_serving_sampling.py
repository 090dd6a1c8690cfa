"""Every request of an engine chooses its tokens, and ends, in its own way."""

import pytest
import torch
from families import VOCABULARY, make_model
from served import SIZES, alone, plan_of, prompts_of
from transformers import LogitsProcessor

from redknot_hf.serving import Engine, Sampling


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


class Favour(LogitsProcessor):
    """Adds to the logits of what has been seen least."""

    def __call__(self, input_ids, scores):
        return scores - 0.5 * torch.bincount(input_ids[0], minlength=VOCABULARY)


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"temperature": 0.7, "top_k": 5}, {"do_sample": True, "temperature": 0.7, "top_k": 5}),
        ({"temperature": 1.0, "top_p": 0.6}, {"do_sample": True, "top_p": 0.6, "top_k": 0}),
        ({"temperature": 1.3, "min_p": 0.2}, {"do_sample": True, "temperature": 1.3, "min_p": 0.2, "top_k": 0}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"processors": (Favour(),)}, {"logits_processor": [Favour()]}),
        ({"logit_bias": {5: 4.0, 7: 3.5}}, {"sequence_bias": [[[5], 4.0], [[7], 3.5]]}),
        (
            {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.2},
            {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.2},
        ),
    ],
    ids=["top_k", "top_p", "min_p", "penalty", "processor", "bias", "all"],
)
def test_every_request_chooses_in_its_own_way(model, asked, options):
    plan = plan_of(model)
    prompts, _ = prompts_of(7, 2, longest=30)
    engine = Engine(model, plan, **SIZES)
    mine = engine.submit(prompts[0], Sampling(max_new_tokens=25, seed=3, **asked))
    plain = engine.submit(prompts[1], Sampling(max_new_tokens=25))
    hot = engine.submit(prompts[2], Sampling(max_new_tokens=25, temperature=2.0))
    engine.drain()
    assert not mine.error, mine.error
    assert mine.ids == alone(model, plan, prompts[0], 25, 3, **options)
    assert plain.ids == alone(model, plan, prompts[1], 25)
    assert len(hot.ids) == 25


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1e-37, "top_p": 0.9},
        {"temperature": 1e-300, "seed": 5},
        {"temperature": 1, "logit_bias": {9: torch.inf}},
    ],
    ids=["overflows", "rounds_to_0", "forced"],
)
def test_what_overflows_takes_the_likeliest_and_ends_nobody_else(model, asked):
    plan = plan_of(model)
    prompts, _ = prompts_of(12, 2, longest=30)
    engine = Engine(model, plan, **SIZES)
    mine, other = engine.generate(prompts[:2], [Sampling(12, **asked), Sampling(12)])
    assert not mine.error, mine.error
    assert mine.ids == ([9] * 12 if "logit_bias" in asked else alone(model, plan, prompts[0], 12))
    assert other.ids == alone(model, plan, prompts[1], 12)


def test_presence_and_frequency_are_of_the_answer(model):
    prompt = prompts_of(8, 1)[0][0]
    engine = Engine(model, plan_of(model), **SIZES)
    free, once, each = engine.generate(
        [prompt] * 3,
        [
            Sampling(max_new_tokens=40),
            Sampling(max_new_tokens=40, presence_penalty=100.0),
            Sampling(max_new_tokens=40, frequency_penalty=100.0),
        ],
    )
    assert len(set(once.ids)) == len(set(each.ids)) == 40
    assert len(set(free.ids)) < 40


def test_log_probabilities_are_the_models(model):
    prompt = prompts_of(9, 1)[0][0]
    engine = Engine(model, plan_of(model, local=False), **SIZES)
    answer = engine.generate([prompt], Sampling(max_new_tokens=5, logprobs=3))[0]
    whole = torch.tensor([prompt + answer.ids])
    with torch.no_grad():
        expected = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for token, row in zip(answer.tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        values, ids = row.topk(3)
        assert [i for i, _ in token.top] == ids.tolist()
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_stops(model, byte_tokenizer):
    plan = plan_of(model)
    prompt = prompts_of(10, 1)[0][0]
    free = alone(model, plan, prompt, 40)
    stop = free[15]
    engine = Engine(model, plan, **SIZES, tokenizer=byte_tokenizer)
    at = free.index(stop) + 1
    text = byte_tokenizer.decode(free[18:20])
    told = engine.generate(
        [prompt] * 3,
        [Sampling(40, stop_ids=[stop]), Sampling(40, stop=[text]), Sampling(40, stop=["never in there"])],
    )
    assert told[0].ids == free[:at]
    assert told[0].reason == "stop"
    assert text in byte_tokenizer.decode(told[1].ids)
    assert text not in byte_tokenizer.decode(told[1].ids[:-1])
    assert told[1].ids == free[: len(told[1].ids)]
    assert told[2].ids == free
    model.generation_config.eos_token_id = [stop, 1]
    try:
        engine = Engine(model, plan, **SIZES)
        ended, on = engine.generate([prompt] * 2, [Sampling(40), Sampling(40, ignore_eos=True)])
    finally:
        model.generation_config.eos_token_id = None
    assert ended.ids == free[:at]
    assert on.ids == free
