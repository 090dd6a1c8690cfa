"""Reuse in the harness: a context's documents are stored once and stand where the context has them."""

from dataclasses import replace

import pytest
import torch
from evaluated import asked
from families import VOCABULARY, make_model

from evals.measuring import measure
from evals.method import Context
from evals.methods import Setting, load
from evals.methods.redknot import redknot
from redknot_hf import HeadPlan, HeadSpec


def with_documents(lengths):
    """Questions about contexts of a short opening and some documents."""
    one = asked(tuple(map(sum, lengths)), tuple(range(len(lengths))))
    parts = tuple(row.split(sizes) for row, sizes in zip(one.context.rows, lengths, strict=True))
    return replace(one, context=Context(one.context.rows, parts, one.context.room))


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=4, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def plan(model):
    return HeadPlan.with_global(model.config, [(0, 1), (1, 0), (2, 3), (3, 3)], HeadSpec(window=16, sink=2))


@pytest.mark.parametrize(
    "spec", ["reuse:boundary=all", "reuse:boundary=prefix", "refresh:share=1.0", "reuse:prefix=0"]
)
def test_recomputing_all_is_reading_the_context(model, plan, spec):
    lengths = [(1, 60, 30), (1, 20, 90)] if spec.startswith("reuse") else [(1, 60, 30)]
    questions = with_documents(lengths)
    reference, held = measure(model, redknot(plan), questions, len(lengths))
    method = load(spec, Setting(model.config, 120, plan))
    records, _ = measure(model, method, questions, len(lengths), held)
    exact = max(abs(kl) for record in records for kl in record["fidelity"]["kl"]) < 1e-5
    assert exact == (spec != "reuse:prefix=0")
    assert not exact or [r["answer_ids"] for r in records] == [r["answer_ids"] for r in reference]


def test_documents_are_stored_once(model, plan):
    method = load("reuse:boundary=4", Setting(model.config, 120, plan))
    assert method.name == "reuse, boundary 4"
    context = with_documents([(1, 60, 30)]).context
    caches = [method.prepare(model, context) for _ in range(2)]
    (store,) = method.stores
    assert store.counts.computed == 3
    assert caches[0].recomputed_tokens == caches[1].recomputed_tokens == 4
    method.check(caches[0])
    with pytest.raises(ValueError, match="another"):
        load("redknot", Setting(model.config, 120, HeadPlan.uniform(model.config, HeadSpec()))).check(caches[0])
    bare = Context((torch.randint(1, VOCABULARY, (9,)),), ((),), 5)
    with pytest.raises(ValueError, match="the task names none"):
        method.prepare(model, bare)
