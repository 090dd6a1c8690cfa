import numpy as np
import pytest
from families import make_model_with_idle_heads
from texts import profiling_prompts as prompts

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import profile_heads
from redknot_hf.profiling.divergence import Divergence


@pytest.fixture(scope="module")
def model():
    return make_model_with_idle_heads()


@pytest.fixture(scope="module")
def profile(model):
    return profile_heads(model, prompts(count=5), windows=(4, 12), method="loss", global_ratio=0.5)


def test_heads_that_do_nothing_go_first(profile):
    errors = profile.errors[:, -1]
    assert set(np.argsort(errors)[:2]) == {2, 4}
    assert profile.plan(global_ratio=0.75).num_global == 6
    assert {(0, 2), (1, 0)} == {
        (layer, head)
        for layer, specs in enumerate(profile.plan(global_ratio=0.75))
        for head, spec in enumerate(specs)
        if not spec.is_global
    }


def test_the_greatest_error_is_the_divergence_with_all_heads_restricted(model, profile):
    divergence = Divergence(model, [prompt for i, prompt in enumerate(prompts(count=5)) if i % 4 != 3])
    for column, window in enumerate((4, 12)):
        found = float(divergence(HeadPlan.uniform(model.config, HeadSpec(window, 4))).mean())
        assert profile.errors[:, column].max() == pytest.approx(found, rel=1e-3)


def test_a_profile_confirms_its_plan_on_prompts_held_out(model, profile):
    (confirmed,) = profile.provenance["held_out"]
    held_out = [prompts(count=5)[3]]
    assert confirmed["prompts"] == 1
    assert confirmed["kl"] == pytest.approx(float(Divergence(model, held_out)(profile.plan())[0]), abs=1e-5)
    assert 0 <= profile.provenance["overlap"] <= 1
    assert profile.provenance["calibration"]["prompts"] == 4
    assert profile.provenance["finished"]


def test_a_plan_is_confirmed_at_other_lengths(model):
    longer = profile_heads(model, prompts(), windows=(4,), budget=0.5, held_out=[*prompts(60), *prompts(90)])
    assert [found["length"] for found in longer.provenance["held_out"]] == [60, 90]
    assert longer.provenance["calibration"]["prompts"] == 2


def test_no_time_makes_a_rougher_profile(model):
    steps = []
    profile = profile_heads(
        model, prompts(), windows=(4,), method="loss", seconds=0, report=lambda stage, done, total: steps.append(done)
    )
    assert profile.plan(global_ratio=0.5).num_global == 4
    assert steps == sorted(steps)
    assert profile.provenance["passes"] == steps[-1]
    assert not profile.provenance["finished"]
    assert "held_out" not in profile.provenance  # no budget, no plan
