"""What goes wrong in an engine's requests, what is refused, and how requests end."""

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import make_model
from served import SIZES, all_free, alone, plan_of, prompts_of
from transformers import LogitsProcessor

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.serving import Engine, Sampling, State, reading
from redknot_hf.serving.admission import ids_of
from redknot_hf.serving.request import Request
from redknot_hf.serving.sampling import choose


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


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


@pytest.mark.parametrize("how", ["raises", "shape", "nothing", "callback", "exit", "source"])
def test_what_goes_wrong_in_one_request_ends_that_one_alone(model, how):
    plan = plan_of(model)
    prompts, _ = prompts_of(11, 2)
    expected = [alone(model, plan, p, 12) for p in prompts]
    engine = Engine(model, plan, **SIZES)
    before = engine.submit(prompts[0], Sampling(12))

    def breaks(*_):
        raise SystemExit(1) if how == "exit" else KeyError("of my own")

    if how in ("callback", "exit"):
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
    engine = Engine(model, plan_of(model), **SIZES | {"memory": 75_000, "max_len": 500})
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


def test_waiting_for_an_engine_that_was_never_started_is_told(model):
    async def awaited(request):
        return await request

    engine = Engine(model, plan_of(model), **SIZES)
    request = engine.submit([5, 6], Sampling(max_new_tokens=2))
    for wait in (request.result, lambda: list(request), lambda: asyncio.run(awaited(request))):
        with pytest.raises(RuntimeError, match=r"never started: call engine\.start\(\)"):
            wait()
    with pytest.raises(TimeoutError):
        request.result(timeout=0.01)
    with engine:
        assert len(request.result()) == len(list(request)) == len(asyncio.run(awaited(request))) == 2
    engine = Engine(model, plan_of(model), **SIZES)
    engine.step()  # by a loop of one's own, which found nothing to do so far
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.submit([5, 6], Sampling(max_new_tokens=2)).result)
        while not waiting.done():
            engine.step()
        assert len(waiting.result()) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"memory": 100}, "the local heads of one sequence need"),
        ({"memory": "much"}, "memory='much': give bytes"),
        ({"memory": float("nan")}, "memory=nan: give bytes"),
        ({"memory": float("inf")}, "memory=inf: give bytes"),
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


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 2.5}, {"max_new_tokens": "5"}, {"max_new_tokens": None}, {"top_k": 1.5}, {"seed": 0.5},
        {"seed": 1 << 64}, {"logprobs": 2.0}, {"temperature": "hot"}, {"temperature": torch.nan},
        {"logit_bias": {5: torch.nan}}, {"logit_bias": {"5": 1}}, {"logit_bias": {5: "1"}},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_a_wrong_kind_are_told_before_any_work(asked):
    sampling = Sampling()
    vars(sampling).update(asked)  # as where types are not checked
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(asked))}=.*: give"):
        sampling.__post_init__()


@pytest.mark.parametrize("prompt", [[[5, 6]], torch.tensor([[5, 6]]), [5.5, 6.0]], ids=["batch", "tensor", "floats"])
def test_prompts_that_are_no_ids_of_one_text_are_told(model, prompt):
    engine = Engine(model, plan_of(model), **SIZES)
    read = inspect.unwrap(ids_of)  # as where types are not checked
    with pytest.raises(TypeError, match="neither a text nor the ids of one: give"):
        read(prompt, engine, True)
    assert read(torch.tensor([5, 6]), engine, True) == [5, 6]


def test_a_priority_of_no_rank_is_told():
    begin = inspect.unwrap(Request.__init__)  # as where types are not checked
    with pytest.raises(TypeError, match="priority=None: give a whole number"):
        begin(object.__new__(Request), [5], Sampling(), priority=None)


def test_a_choice_that_fails_ends_who_chose_and_not_the_engine(model, monkeypatch):
    plan, left = plan_of(model), iter(range(100))

    def breaks(logits, choosers):
        if next(left) == 3:  # none of the first ones, which are chosen one by one
            raise RuntimeError("no luck")
        return choose(logits, choosers)

    monkeypatch.setattr(reading, "choose", breaks)
    prompts, _ = prompts_of(13, 2)
    engine = Engine(model, plan, **SIZES)
    first = engine.generate([prompts[0][:9]], Sampling(12, temperature=0.7))[0]
    assert "no luck" in str(first.error)
    assert len(first.ids) == 3
    assert engine.generate([prompts[1]], Sampling(12))[0].ids == alone(model, plan, prompts[1], 12)
    assert all_free(engine)


def test_a_processor_is_called_once_a_token_whoever_else_fails(model):
    calls = {"counts": 0, "fails": 0}

    def counts(ids, scores):
        calls["counts"] += 1
        return scores

    def fails(ids, scores):
        calls["fails"] += 1
        return scores if calls["fails"] < 3 else scores * torch.nan

    engine = Engine(model, plan_of(model), **SIZES)
    good, bad = (engine.submit([5, 6, 7], Sampling(6, processors=(one,))) for one in (counts, fails))
    while not engine.idle:
        engine.step()
    assert "leaves no token" in str(bad.error)
    assert calls["counts"] == len(good.ids) == 6


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
