"""Served requests get the tokens of `generate` with the same plan, whatever else is served beside them."""

import asyncio
import random
import threading
import time

import pytest
import torch
from families import FAMILIES, VOCABULARY, make_model
from transformers import LogitsProcessor

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache
from redknot_hf.serving import Engine, Sampling, State
from redknot_hf.serving.engine import QueueFullError

SIZES = {"max_batch": 4, "max_len": 256, "chunk": 24, "page_size": 16, "memory": 1 << 22}


def plan_of(model, local=True):
    rule = HeadSpec(window=20, sink=2)
    return HeadPlan.with_global(model.config, [(1, 1)], rule) if local else HeadPlan.uniform(model.config, HeadSpec())


def prompts_of(seed, count, longest=90):
    """Random prompts, and two that begin like the first."""
    draw = random.Random(seed)
    made = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(max(count, 2))]
    return [*made, made[0] + made[1], made[0] + made[-1]], draw


def alone(model, plan, prompt, new, seed=None, **options):
    """What `generate` gives for one prompt."""
    if seed is not None:
        torch.manual_seed(seed)
    cache = RedKnotCache(model.config, plan, page_size=16)
    options = {"do_sample": False, **options}
    out = model.generate(torch.tensor([prompt]), past_key_values=cache, max_new_tokens=new, **options)
    return out[0, len(prompt) :].tolist()


def all_free(engine):
    """Whether all pages are back when prefixes are let go."""
    while engine.memory.evict():
        pass
    return engine.memory.used()["used"] == 0 and engine.memory.host_used == 0


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.mark.core
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family, local):
    model = make_model(family)
    plan = plan_of(model, local)
    prompts, draw = prompts_of(1, 5)
    new = [draw.randint(1, 20) for _ in prompts]
    expected = [alone(model, plan, p, n) for p, n in zip(prompts, new, strict=True)]
    engine = Engine(model, plan, **SIZES)
    answers = engine.generate(prompts, [Sampling(max_new_tokens=n) for n in new])
    assert [x.ids for x in answers] == expected
    assert all(x.state is State.DONE and x.reason == "length" for x in answers)
    assert all_free(engine)


@pytest.mark.parametrize("preempt", ["swap", "recompute", None])
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("seed", range(2))
def test_any_mix_of_arrivals_chunks_and_preemptions(model, preempt, local, seed):
    plan = plan_of(model, local)
    prompts, draw = prompts_of(seed, 6)
    asked = [
        Sampling(max_new_tokens=draw.randint(1, 40), temperature=draw.choice((0, 0.8)), seed=i)
        for i in range(len(prompts))
    ]
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0}
    expected = [
        alone(model, plan, p, s.max_new_tokens, s.seed, **(options if s.temperature else {}))
        for p, s in zip(prompts, asked, strict=True)
    ]
    chunk, parked = draw.choice((5, 16, 40)), draw.choice((0, 0.5))
    memory = 360_000 if local else 430_000
    engine = Engine(model, plan, **SIZES | {"memory": memory, "chunk": chunk, "preempt": preempt, "parked": parked})
    engine.scheduler.ahead = 1
    found = []
    for prompt, how in zip(prompts, asked, strict=True):
        found.append(engine.submit(prompt, how, priority=draw.choice((0, 0, 1))))
        for _ in range(draw.randint(0, 6)):
            engine.step()
    assert engine.drain()
    assert [x.result() for x in found] == expected
    assert all_free(engine)
    counted = engine.scheduler.preemptions
    assert sum(counted.values()) == sum(x.preempted for x in found)
    if preempt is None:
        assert not any(counted.values())


@pytest.mark.parametrize("preempt", ["swap", "recompute"])
def test_preempted_sequences_go_on_as_if_nothing_had_been(model, preempt):
    plan = plan_of(model)
    prompts, _ = prompts_of(3, 4, longest=60)
    expected = [alone(model, plan, p, 50) for p in prompts]
    engine = Engine(model, plan, **SIZES | {"memory": 400_000, "preempt": preempt, "parked": 0})
    engine.scheduler.ahead = 1
    low = [engine.submit(p, Sampling(max_new_tokens=50)) for p in prompts[1:]]
    for _ in range(20):
        engine.step()
    high = engine.submit(prompts[0], Sampling(max_new_tokens=50), priority=1)
    engine.drain()
    assert [x.result() for x in (high, *low)] == expected
    assert engine.scheduler.preemptions[preempt] > 0
    assert all_free(engine)


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_prefixes_are_read_once(model, local):
    plan = plan_of(model, local)
    prompts, _ = prompts_of(4, 6)
    shared = prompts[0] + prompts[1] + prompts[2]
    texts = [shared, shared, shared + prompts[3], shared[:-3] + prompts[4]]
    expected = [alone(model, plan, p, 9) for p in texts]
    engine = Engine(model, plan, **SIZES)
    first = engine.generate([shared], Sampling(max_new_tokens=9))[0]
    read = engine.reader.read
    again = engine.generate(texts[1:], Sampling(max_new_tokens=9))
    assert [first.ids, *(x.ids for x in again)] == expected
    assert [x.cached for x in again] == [len(shared) - 1, len(shared), len(shared) - 3]
    assert engine.reader.read - read == 1 + len(prompts[3]) + len(prompts[4])
    assert all_free(engine)


def test_a_prefix_is_not_used_where_rings_have_lost_it(model):
    prompts, _ = prompts_of(5, 6)
    shared = prompts[0] + prompts[1] + prompts[2]
    short = shared[:-60] + prompts[3]
    for local, cached in ((True, 0), (False, len(shared) - 60)):
        plan = plan_of(model, local)
        engine = Engine(model, plan, **SIZES | {"chunk": 200})
        engine.generate([shared], Sampling(max_new_tokens=1))
        answer = engine.generate([short], Sampling(max_new_tokens=6))[0]
        assert answer.ids == alone(model, plan, short, 6)
        assert answer.cached == cached


def test_answers_to_one_prompt_are_forks(model):
    plan, prompt = plan_of(model), prompts_of(6, 2)[0][-1]
    engine = Engine(model, plan, **SIZES)
    asked = engine.submit_many(prompt, 4, Sampling(max_new_tokens=12, temperature=1.2, seed=7))
    engine.drain()
    options = {"do_sample": True, "temperature": 1.2, "top_k": 0}
    assert [x.ids for x in asked] == [alone(model, plan, prompt, 12, 7 + i, **options) for i in range(4)]
    assert engine.reader.read == len(prompt) + 3
    assert all_free(engine)


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


class Broken(LogitsProcessor):
    """Breaks at the third token."""

    def __init__(self, how):
        self.how, self.left = how, 3

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left:
            return scores
        if self.how == "raises":
            raise KeyError("of my own")
        return scores[0] if self.how == "shape" else torch.full_like(scores, -torch.inf)


@pytest.mark.parametrize("how", ["raises", "shape", "nothing", "callback", "source"])
def test_what_goes_wrong_in_one_request_ends_that_one_alone(model, how):
    plan = plan_of(model)
    prompts, _ = prompts_of(11, 2)
    expected = [alone(model, plan, p, 12) for p in prompts]
    engine = Engine(model, plan, **SIZES)
    before = engine.submit(prompts[0], Sampling(12))

    def breaks(*_):
        raise KeyError("of my own")

    if how == "callback":
        bad = engine.submit(prompts[1], Sampling(12), callback=breaks)
    elif how == "source":
        bad = engine.submit(prompts[1], Sampling(12), source=breaks)
    else:
        bad = engine.submit(prompts[1], Sampling(12, processors=[Broken(how)]))
    after = engine.submit(prompts[2], Sampling(12))
    assert engine.drain()
    assert bad.state is State.FAILED
    with pytest.raises(RuntimeError, match=f"request {bad.number} failed"):
        bad.result()
    assert [before.result(), after.result()] == [expected[0], expected[2]]
    assert all_free(engine)


@pytest.mark.parametrize("when", [0, 1, 2, 5, 12])
def test_cancelled_requests_leave_within_a_step(model, when):
    plan = plan_of(model)
    prompts, _ = prompts_of(12, 6)
    engine = Engine(model, plan, **SIZES | {"max_batch": 2, "chunk": 16})
    others = [engine.submit(p, Sampling(20)) for p in prompts[1:4]]
    gone = engine.submit(prompts[0], Sampling(200 - len(prompts[0])), priority=when % 2)
    for _ in range(when):
        engine.step()
    gone.cancel()
    engine.step()
    assert gone.state is State.CANCELLED
    assert gone.reason == "cancelled"
    engine.drain()
    assert [x.result() for x in others] == [alone(model, plan, p, 20) for p in prompts[1:4]]
    assert all_free(engine)


def test_deadlines(model):
    engine = Engine(model, plan_of(model), **SIZES)
    late = engine.submit([5] * 20, Sampling(100), timeout=0.0)
    fine = engine.submit([6] * 20, Sampling(5), timeout=600.0)
    engine.drain()
    assert (late.state, late.reason) == (State.CANCELLED, "deadline")
    assert len(fine.result()) == 5


def test_requests_that_can_never_fit_are_refused_with_their_bytes(model):
    engine = Engine(model, plan_of(model), **SIZES | {"memory": 150_000, "max_len": 500})
    with pytest.raises(ValueError, match=r"400 tokens of prompt and 50 new ones need [\d,]+ bytes .* has [\d,]+ in"):
        engine.submit([5] * 400, Sampling(50))
    with pytest.raises(ValueError, match="more than max_len=500"):
        engine.submit([5] * 480, Sampling(50))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit([])
    with pytest.raises(ValueError, match="ids from 5 to 97"):
        engine.submit([5, 97])
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        engine.submit([5], Sampling(stop=["x"]))
    with pytest.raises(ValueError, match="the prompt is text"):
        engine.submit("text")
    assert engine.idle


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"memory": 100}, "the local heads of one sequence need"),
        ({"memory": "much"}, "memory='much': give bytes"),
        ({"preempt": "drop"}, "preempt='drop'"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"parked": 2}, "parked=2"),
        ({"chunk": 0}, "chunk=0"),
    ],
    ids=str,
)
def test_bad_arguments(model, options, told):
    with pytest.raises(ValueError, match=told):
        Engine(model, plan_of(model), **SIZES | options)


@pytest.mark.parametrize("asked", [{"temperature": -1}, {"top_p": 0}, {"repetition_penalty": 0}, {"stop": "text"}])
def test_bad_samplings(asked):
    with pytest.raises(ValueError, match=next(iter(asked))):
        Sampling(**asked)


def test_models_that_keep_more_than_keys_are_refused():
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    config = Qwen3NextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, vocab_size=50, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="redknot").eval()
    with pytest.raises(ValueError, match="beside keys and values"):
        Engine(model, HeadPlan.uniform(config, HeadSpec()), memory=1 << 22, max_len=64)


def test_phi3_beyond_its_switch_is_refused():
    model = make_model("phi3")
    model.config.original_max_position_embeddings = 128
    with pytest.raises(ValueError, match="max_len=128 or less"):
        Engine(model, plan_of(model), **SIZES)


def test_threads_hand_requests_in_and_take_tokens_out(model):
    plan = plan_of(model)
    prompts, _ = prompts_of(13, 6)
    expected = [alone(model, plan, p, 15) for p in prompts]
    found, called = [None] * len(prompts), []
    with Engine(model, plan, **SIZES) as engine:

        def ask(i):
            request = engine.submit(prompts[i], Sampling(15), callback=lambda r, t: called.append((r.number, t)))
            found[i] = [token.id for token in request]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        async def stream():
            requests = [engine.submit(p, Sampling(15)) for p in prompts]
            return [[token.id async for token in r] for r in requests[:3]] + [await r for r in requests[3:]]

        assert asyncio.run(stream()) == expected
        assert engine.generate(prompts[:2], Sampling(15), progress=True)[1].ids == expected[1]
    assert found == expected
    assert sum(token is None for _, token in called) == len(prompts)
    assert sum(token is not None for _, token in called) == 15 * len(prompts)
    with pytest.raises(RuntimeError, match="takes no requests any more"):
        engine.submit(prompts[0])


def test_drain_waits_and_shutdown_does_not(model):
    engine = Engine(model, plan_of(model), **SIZES).start()
    first = engine.submit([5] * 30, Sampling(30))
    assert engine.drain(timeout=60)
    assert len(first.result()) == 30
    engine.shutdown()
    engine = Engine(model, plan_of(model), **SIZES).start()
    long = engine.submit([5] * 30, Sampling(200))
    while not long.tokens:
        time.sleep(0.001)
    engine.shutdown()
    assert (long.state, long.reason) == (State.CANCELLED, "shutdown")
    assert not engine.alive
    assert all_free(engine)


def test_the_queue_has_an_end(model):
    engine = Engine(model, plan_of(model), **SIZES | {"queue": 2})
    for _ in range(2):
        engine.submit([5])
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit([5])


def test_a_broken_engine_tells_everyone(model, monkeypatch):
    engine = Engine(model, plan_of(model), **SIZES)
    request = engine.submit([5] * 30, Sampling(100))
    monkeypatch.setattr(engine.scheduler, "plan", lambda: 1 / 0)
    engine.start()
    with pytest.raises(RuntimeError, match="failed: division by zero"):
        request.result(timeout=30)
    assert not engine.alive
    with pytest.raises(RuntimeError, match="division by zero"):
        engine.submit([5])
