import pytest
import torch
from families import make_model
from oracle import masked_logits, random_plan
from texts import profiling_prompts as prompts

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import Prompt, fidelity
from redknot_hf.profiling.fidelity import judged


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def test_fidelity_by_length(model):
    plan, some = random_plan(model.config), [*prompts(60, 1), *prompts(40, 2)]
    short, long = fidelity(model, plan, some)
    assert (short["length"], short["prompts"], long["length"], long["prompts"]) == (40, 2, 60, 1)
    assert short["kl"] > 0
    assert 0 < short["agreement"] < 1
    whole = HeadPlan.uniform(model.config, HeadSpec())
    assert all(r["kl"] < 1e-6 and r["agreement"] == 1 and r["holds"] for r in fidelity(model, whole, some))
    assert fidelity(model, plan, []) == []


def test_a_plan_holds_where_it_is_as_right_as_the_model(model):
    """Of tokens that the model itself predicts, a plan that changes predictions misses some."""
    ids = prompts()[0].ids.clone()
    for place in range(20, 40):
        ids[place] = masked_logits(model, HeadPlan.uniform(model.config, HeadSpec()), ids[None])[0, place - 1].argmax()
    prompt = Prompt(ids, torch.arange(40) >= 20)
    found = {}
    for window in (1, 39):
        (found[window],) = fidelity(model, HeadPlan.uniform(model.config, HeadSpec(window)), [prompt])
        assert found[window]["dense_accuracy"] == 1
        assert found[window]["accuracy"] == found[window]["agreement"]
    assert not found[1]["holds"]
    assert found[39]["holds"]


def found(kl, accuracy, dense):
    return {"kl": kl, "agreement": 0.9, "accuracy": accuracy, "dense_accuracy": dense}


def test_kinds_that_the_model_cannot_do_are_shown_and_left_out():
    asked = [Prompt(torch.arange(9), kind=kind) for kind in ("copy", "copy", "riddle", "text", "text")]
    rows = [
        found(0.01, 0.9, 0.9),
        found(0.03, 0.9, 0.9),
        found(3.0, 0.0, 0.1),
        found(0.0, 0.2, 0.2),
        found(0.0, 0.2, 0.2),
    ]
    row = judged(asked, rows)
    assert row["kl"] == pytest.approx(0.01)  # of copies 0.02 and of texts 0, each kind counting alike
    assert (row["accuracy"], row["dense_accuracy"], row["holds"]) == (0.55, 0.55, True)
    assert [(kind["kind"], kind["judged"]) for kind in row["kinds"]] == [
        ("copy", True), ("riddle", False), ("text", True),
    ]  # fmt: skip
    assert row["kl_interval"][0] <= row["kl"] <= row["kl_interval"][1]
    assert not judged(asked[2:3], rows[2:3])["holds"], "nothing is confirmed by what the model cannot do"
    assert judged(asked[2:3], rows[2:3])["kl_interval"] is None
    alone = [Prompt(torch.arange(9), kind=kind) for kind in ("copy", "text", "pairs", "home")]
    assert judged(alone, [found(kl, 0.9, 0.9) for kl in (0.0, 0.1, 0.2, 0.3)])["kl_interval"] is None, "no spread seen"


@pytest.mark.parametrize(("kl", "accuracy", "holds"), [(0.04, 0.9, True), (0.06, 0.9, False), (0.04, 0.88, False)])
def test_a_plan_holds_by_divergence_and_by_answers(kl, accuracy, holds):
    asked = [Prompt(torch.arange(9), kind="copy")]
    assert judged(asked, [found(kl, accuracy, 0.9)])["holds"] == holds
    assert judged(asked, [found(kl, accuracy, 0.9)], max_kl=1e-9)["holds"] is False
