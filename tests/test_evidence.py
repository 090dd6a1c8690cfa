import pytest

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.plan.evidence import evidence

KIND = {"kl": 0.01, "accuracy": 0.6, "dense_accuracy": 0.62, "judged": True}
ROW = {"length": 2048, "kl": 0.0123, "accuracy": 0.5, "dense_accuracy": 0.52, "holds": False}


def test_a_plan_prints_what_confirms_it():
    kinds = [{"kind": "copy", **KIND}, {"kind": "two_hop", **KIND, "dense_accuracy": 0.1, "judged": False}]
    row = ROW | {"kinds": kinds, "kl_interval": [0.01, 0.02], "accuracy_interval": [-0.05, 0.01]}
    lines = str(HeadPlan([[HeadSpec()]], provenance={"held_out": [row], "overlap": 0.9})).splitlines()[-4:]
    assert lines == [
        "held out, 2048 tokens: KL 0.0123 (0.0100 to 0.0200), right 50.0% (dense 52.0%) (-5.0% to +1.0%): "
        "the plan does not hold at this length",
        "  copy     KL 0.0100, right 60.0% (dense 62.0%)",
        "  two_hop  left out of the verdict: the model itself is right on 10.0%",
        "both halves of the prompts agree on 90% of the global heads",
    ]
    (*_, last) = evidence({"held_out": [ROW], "overlap": 0.76})
    assert last.endswith(
        "agree on 76% of the global heads: more prompts would settle more (redknot profile --prompts)"
    )


def test_a_plan_that_nothing_confirms_says_so():
    assert evidence({}) == []
    assert "nothing confirms this plan" in evidence({"held_out": []})[0]
    assert evidence({"held_out": [ROW]})[0].startswith("held out, 2048 tokens: KL 0.0123, right 50.0%")


@pytest.mark.parametrize("damaged", [7, "x", {"length": 1}, [{}], [7], [None]])
def test_other_provenance_is_no_reason_to_fail(damaged):
    assert len(evidence({"held_out": damaged, "overlap": "much"})) <= 1
