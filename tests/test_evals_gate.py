"""The gate on the bundled model, as CI runs it: its plan passes, the same plan shuffled fails."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import evals
from evals.bench import BUNDLED
from evals.fidelity_gate import Limits
from evals.methods.redknot import misplaced
from redknot_hf import HeadPlan


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32, attn_implementation="redknot")


def test_the_bundled_plan_passes_and_a_shuffled_one_fails(model):
    plan = HeadPlan.load(BUNDLED / "plan.json", model.config)
    options = {"task": "tiny/code", "length": 280, "count": 20, "limits": Limits(points=20, top1=90, kl=0.1)}
    good = evals.gate(model, plan, **options)
    assert good, str(good)
    assert good.row.answers == 20
    assert str(good).startswith("passes: redknot on tiny/code at 280 tokens\n")
    bad = evals.gate(model, misplaced(plan), **{**options, "count": 8})
    assert not bad
    assert len(bad.missed) == 3
    apart = bad.row.score_difference
    assert apart is not None
    assert apart.value < -30
    assert apart.low is None  # two contexts make no interval
    assert model.config._attn_implementation == "redknot"


def test_gate_refuses_a_plan_of_another_model(model):
    wrong = HeadPlan(HeadPlan.load(BUNDLED / "plan.json").heads[:3])
    with pytest.raises(ValueError, match="the plan has 3 layers"):
        evals.gate(model, wrong, task="tiny/code", length=280, count=1)
