"""The pipeline of text: equal to `generate` with ids, for many questions, in batches and streamed."""

import copy

import pytest
import torch
from families import make_model
from oracle import random_plan
from transformers import pipeline

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, Seams
from redknot_hf.pipeline import TASK, RedKnotPipeline

CONTEXT = "The house is green. Ann lives there. Bob moved out in May, and took the cat. " * 4
QUESTIONS = ["Who lives there?", "And the cat?", "Which colour has the house that Ann lives in?"]
NEW = {"max_new_tokens": 5, "do_sample": False}
TURNS = "<s>{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}[end]{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def model(byte_tokenizer):
    return make_model(
        "llama", num_hidden_layers=2, vocab_size=len(byte_tokenizer), max_position_embeddings=4096, pad_token_id=None
    )


@pytest.fixture(scope="module")
def plan(model):
    return random_plan(model.config)


@pytest.fixture(scope="module", params=["plain", "chat"])
def made(request, model, plan, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = TURNS if request.param == "chat" else None
    return pipeline(TASK, model=model, tokenizer=tokenizer, plan=plan, device="cpu")


@pytest.fixture(scope="module")
def wanted(made, model, plan):
    """By hand: the whole prompt and a fresh cache for each question."""
    said = []
    seams = Seams(made.tokenizer)
    for question in QUESTIONS:
        ids = torch.tensor([[*seams.head, *seams.document(CONTEXT), *seams.question(question)]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=RedKnotCache(model.config, plan), **NEW
        )
        said.append(seams.answer(out[0, ids.shape[1] :].tolist()))
    return said


def test_answers_are_those_of_generate(made, wanted):
    assert type(made) is RedKnotPipeline
    assert len(set(wanted)) > 1
    assert made(CONTEXT, question=QUESTIONS[0], **NEW) == {"answer": wanted[0]}
    for batch_size in (1, 2, 3):
        assert made(CONTEXT, questions=QUESTIONS, batch_size=batch_size, **NEW) == {"answers": wanted}
    assert made([CONTEXT, CONTEXT], QUESTIONS[1], **NEW) == [{"answer": wanted[1]}] * 2


def test_a_context_is_read_once(made, model):
    read = []
    watch = model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    made(CONTEXT, questions=QUESTIONS, **NEW)
    watch.remove()
    assert len([tokens for tokens in read if tokens > 50]) == 1


def test_pieces_of_a_stream_are_the_answer(made, wanted):
    pieces = list(made.stream(CONTEXT, QUESTIONS[2], **NEW))
    assert "".join(pieces).strip() == wanted[2]
    with pytest.raises(ValueError, match="a question is ''"):
        list(made.stream(CONTEXT, "", **NEW))


def test_a_plan_is_a_file_and_attention_is_set(model, plan, byte_tokenizer, tmp_path):
    plan.save(tmp_path / "plan.json")
    model.set_attn_implementation("sdpa")
    made = pipeline(TASK, model=model, tokenizer=byte_tokenizer, plan=tmp_path / "plan.json", device="cpu")
    assert made.plan == plan
    assert made(CONTEXT, QUESTIONS[0], **NEW)["answer"] is not None
    assert model.config._attn_implementation == "redknot"


def test_a_budget_is_profiled_once_where_a_file_is_named(model, byte_tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    options = {"tokenizer": byte_tokenizer, "plan": path, "profile_length": 600, "device": "cpu"}
    made = pipeline(TASK, model=model, budget=0.6, **options)
    assert isinstance(made.plan, HeadPlan)
    assert made.plan.nbytes(600, 16, 4) <= 0.6 * HeadPlan.uniform(model.config, HeadSpec()).nbytes(600, 16, 4)
    assert made.plan.provenance["budget"] == 0.6
    monkeypatch.setattr("redknot_hf.profiling.profile_heads", None)
    assert pipeline(TASK, model=model, budget=0.6, **options).plan == made.plan == HeadPlan.load(path)
    with pytest.raises(ValueError, match=r"was made for budget=0\.6, not 0\.3: name another file"):
        pipeline(TASK, model=model, budget=0.3, **options)
    with pytest.raises(ValueError, match=r"there is no folder .*missing to write the plan to"):
        pipeline(TASK, model=model, budget=0.3, **options | {"plan": tmp_path / "missing" / "plan.json"})


def test_a_plan_or_a_budget_is_asked_for(model, plan, byte_tokenizer):
    for options, message in (
        ({}, "give a plan, or a budget"),
        ({"plan": plan, "budget": 0.3}, "leave the budget out"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(TASK, model=model, tokenizer=byte_tokenizer, device="cpu", **options)


def test_what_is_off_is_told(made, model, plan, byte_tokenizer):
    with pytest.raises(ValueError, match="give a question, or a list"):
        made(CONTEXT)
    with pytest.raises(ValueError, match="give a list with a question"):
        made(CONTEXT, questions="Who?")
    with pytest.raises(ValueError, match="a document is ''"):
        made("", "Who?")
    with pytest.raises(TypeError, match="plann: no option"):
        pipeline(TASK, model=model, tokenizer=byte_tokenizer, plan=plan, plann=1, device="cpu")
