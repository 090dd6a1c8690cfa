import itertools
import json

import numpy as np
import pytest

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import HeadProfile


def make(errors, windows=(4, 16), halves=None, shape=(2, 2), **more):
    errors = np.array(errors, dtype=float)
    halves = (errors, errors) if halves is None else tuple(np.array(half, dtype=float) for half in halves)
    choices = tuple(HeadSpec(window, 1) for window in windows)
    dims = ((1, 1),) * len(shape)
    return HeadProfile("drift", shape, choices, errors, halves, length=100, head_dims=dims, itemsize=4, **more)


ERRORS = [[0.1, 0.05], [0.9, 0.8], [0.3, 0.02], [0.7, 0.4]]


def test_every_local_head_has_the_smallest_window_within_the_error():
    plan = make(ERRORS).plan(max_error=0.4)
    small, wide = HeadSpec(4, 1), HeadSpec(16, 1)
    assert plan == HeadPlan([[small, HeadSpec()], [small, wide]])
    assert plan.provenance["drift"] == 0.4


@pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.75, 1])
def test_a_ratio_is_exact_and_keeps_the_worst_heads(ratio):
    plan = make(ERRORS).plan(global_ratio=ratio)
    assert plan.num_global == 4 * ratio
    heads = [spec for layer in plan for spec in layer]
    worst = sorted(range(4), key=lambda head: -ERRORS[head][1])[: plan.num_global]
    assert {head for head in range(4) if heads[head].is_global} == set(worst)


def test_a_ratio_is_exact_where_all_errors_are_equal():
    assert make(np.full((4, 2), 0.5)).plan(global_ratio=0.5).num_global == 2


@pytest.mark.parametrize("budget", [0.06, 0.1, 0.3, 0.5, 0.75, 0.9, 1])
def test_a_budget_holds_and_is_used(budget):
    profile = make(ERRORS)
    plan = profile.plan(budget=budget)
    share = plan.nbytes(100, 1, 4) / (4 * 100 * 8)
    assert share <= budget
    # No plan of these bytes sums up to less, and none that fits is better by swapping one head's choice.
    assert summed(profile, plan) == pytest.approx(min(e for b, e in every_plan(profile) if b <= share))
    heads = [spec for layer in plan for spec in layer]
    for head, spec in ((h, spec) for h in range(4) for spec in (*profile.choices, HeadSpec())):
        other = HeadPlan([(changed := [*heads[:head], spec, *heads[head + 1 :]])[:2], changed[2:]])
        fits = other.nbytes(100, 1, 4) <= budget * 4 * 100 * 8
        assert not fits or summed(profile, other) >= summed(profile, plan) - 1e-12
    assert plan == profile.plan(bytes_per_token=budget * 4 * 8)


def summed(profile, plan):
    options = (*profile.choices, HeadSpec())
    squares = np.concatenate([profile.errors, np.zeros((4, 1))], 1) ** 2
    return sum(squares[h, options.index(spec)] for h, spec in enumerate(spec for layer in plan for spec in layer))


def every_plan(profile):
    """Share and summed squared error of all plans there are."""
    for heads in itertools.product((*profile.choices, HeadSpec()), repeat=4):
        plan = HeadPlan([heads[:2], heads[2:]])
        yield plan.nbytes(100, 1, 4) / 3200, summed(profile, plan)


def test_the_curve_says_what_every_budget_will_err():
    profile = make(ERRORS)
    curve = profile.curve()
    assert curve[0] == pytest.approx((0.05, np.sqrt(0.1**2 + 0.9**2 + 0.3**2 + 0.7**2)))
    assert curve[-1] == pytest.approx((1, 0))
    for share, error in curve:
        assert error**2 == pytest.approx(min(e for b, e in every_plan(profile) if b <= share + 1e-9), abs=1e-12)
        assert summed(profile, profile.plan(budget=min(1, share + 1e-9))) == pytest.approx(error**2, abs=1e-12)
    assert [error for _, error in curve] == sorted((error for _, error in curve), reverse=True)


def test_a_budget_is_said_at_the_length_that_is_served():
    profile = make(ERRORS)
    for length in (50, 100, 1000):
        plan = profile.plan(budget=0.4, length=length)
        assert plan.nbytes(length, 1, 4) <= 0.4 * 4 * length * 8
        assert plan.provenance["length"] == length
    assert profile.plan(budget=0.4, length=1000).num_global == 1
    assert profile.plan(budget=0.3, length=50).num_global == 0
    assert profile.curve(1000)[0][0] == pytest.approx(0.005)
    with pytest.raises(ValueError, match=r"a sequence of 10 tokens keeps 0\.5"):
        profile.plan(budget=0.4, length=10)
    with pytest.raises(ValueError, match="length is 0"):
        profile.plan(budget=0.4, length=0)


def test_layers_of_other_dims_cost_what_they_hold():
    errors = np.full((4, 1), 0.5)
    dims = ((1, 1), (6, 2))
    profile = HeadProfile(
        "drift", (2, 2), (HeadSpec(25),), errors, (errors, errors), length=100, head_dims=dims, itemsize=2
    )
    plan = profile.plan(budget=0.49)
    assert [[spec.is_global for spec in layer] for layer in plan] == [[True, True], [False, False]]
    assert profile.curve()[0][0] == pytest.approx(0.25)


def test_what_a_search_found_is_the_plan_of_its_target_only():
    profile = make(ERRORS, target={"budget": 0.5}, searched=(2, 0, 0, 0), provenance={"held_out": [1], "model": "m"})
    assert [spec.is_global for layer in profile.plan() for spec in layer] == [True, False, False, False]
    assert profile.plan() == profile.plan(budget=0.5)
    other = profile.plan(budget=0.6)
    assert [spec.is_global for layer in other for spec in layer] == [False, True, False, True]
    assert "held_out" in profile.plan().provenance, "what confirmed this plan"
    assert "held_out" not in other.provenance, "what confirmed another plan"
    assert "held_out" not in profile.plan(budget=0.5, length=99).provenance
    assert other.provenance["overlap"] == 1


def test_a_profile_explains_itself():
    text = str(make(ERRORS, target={"budget": 0.5}))
    assert "HeadProfile(drift: 2 layers, 4 KV heads, choices window 4, window 16)" in text
    assert "bytes kept of 100 tokens, and drift foretold (bytes from 5.0% on):" in text
    assert "HeadPlan: 2 layers x 2 KV heads" in text


@pytest.mark.parametrize("bound", [{"budget": 0.04}, {"bytes_per_token": 1.5}])
def test_an_impossible_budget_names_the_least(bound):
    with pytest.raises(ValueError, match=r"impossible.*0\.05|impossible.*1\.6"):
        make(ERRORS).plan(**bound)


def test_exactly_one_bound():
    with pytest.raises(ValueError, match="no bound is given"):
        make(ERRORS).plan()
    with pytest.raises(ValueError, match="exactly one"):
        make(ERRORS).plan(budget=0.5, max_error=0.1)
    assert make(ERRORS, target={"global_ratio": 0.25}).plan().num_global == 1


def test_noise_over_windows_is_smoothed():
    profile = make([[0.1, 0.3], [0.2, 0.1], [0.0, 0.0], [0.5, 0.5]])
    assert profile.errors.tolist()[0] == [0.3, 0.3]


def test_few_bits_and_windows_are_not_compared_and_more_bits_err_less():
    choices = (HeadSpec(16), HeadSpec(storage="int4"), HeadSpec(storage="int8"))
    errors = np.array([[0.9, 0.1, 0.2], [0.05, 0.3, 0.01]])
    profile = HeadProfile(
        "drift", (1, 1), choices, errors, (errors, errors), length=1000, head_dims=((64, 64),) * 2, itemsize=2
    )
    assert profile.errors.tolist() == [[0.9, 0.2, 0.2], [0.05, 0.3, 0.01]]
    plan = profile.plan(budget=0.25)
    assert [spec for layer in plan for spec in layer] == [HeadSpec(storage="int4"), HeadSpec(16)]


def test_overlap_of_two_halves():
    other = [[0.1, 0.9], [0.9, 0.8], [0.3, 0.02], [0.7, 0.4]]
    profile = make(ERRORS, halves=(ERRORS, other))
    assert profile.overlap(global_ratio=0.5) == pytest.approx(1 / 3)  # {1, 3} and {0, 1}
    assert profile.overlap(global_ratio=1) == profile.overlap(global_ratio=0) == 1
    assert make(ERRORS).overlap(max_error=0.1) == 1


def test_a_file_gives_the_same_profile(tmp_path):
    profile = make(ERRORS, target={"budget": 0.5}, provenance={"model": "m"}, halves=(ERRORS, np.ones((4, 2))))
    profile.save(tmp_path / "profile.json")
    again = HeadProfile.load(tmp_path / "profile.json")
    assert again.plan() == profile.plan()
    assert again.plan().provenance == profile.plan().provenance
    assert again.overlap() == profile.overlap()
    assert str(again) == str(profile)


@pytest.mark.parametrize(
    ("text", "message"),
    [("nothing", "is no profile"), ("[]", "is no profile"), ('{"format": "redknot-plan"}', "has format"),
     ('{"format": "redknot-profile", "version": 1}', "is damaged")],
)  # fmt: skip
def test_a_wrong_file_is_told(tmp_path, text, message):
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        HeadProfile.load(tmp_path / "profile.json")


@pytest.mark.parametrize("name", ["heads_by_layer", "choices", "errors", "halves", "length", "target", "searched"])
@pytest.mark.parametrize("entry", [7, "x", [["x"]], {"a": []}, -1, 1e300, 10**40, True, [[1, 2], [3]], [None], {}])
def test_a_damaged_file_is_told(tmp_path, name, entry):
    path = tmp_path / "profile.json"
    make(ERRORS).save(path)
    data = json.loads(path.read_text()) | {name: entry}
    path.write_text(json.dumps(data))
    if (name, entry) in (("length", 7), ("target", {}), ("length", 1)):
        return
    with pytest.raises(ValueError, match="is damaged"):
        HeadProfile.load(path).plan(budget=0.5)


def test_files_of_version_1_are_read(tmp_path):
    old = {"format": "redknot-profile", "version": 1, "method": "drift", "heads_by_layer": [2, 2], "windows": [4, 16]}
    old |= {"sink": 1, "length": 100, "token_bytes": 8, "target": {"budget": 0.5}, "provenance": {"model": "m"}}
    old |= {"errors": ERRORS, "halves": [ERRORS, ERRORS]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert HeadProfile.load(tmp_path / "old.json").plan() == make(ERRORS).plan(budget=0.5)
    (tmp_path / "old.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no profile"):
        HeadProfile.load(tmp_path / "old.json")


def test_errors_must_be_finite_and_fit():
    with pytest.raises(ValueError, match="must be finite"):
        make([[0.1, 0.05], [0.9, np.nan], [0.3, 0.02], [0.7, 0.4]])
    with pytest.raises(ValueError, match="each of 4 heads"):
        make([[0.1, 0.05]])


def test_a_table_by_layer():
    profile = make([*ERRORS, [0.2, 0.1]], shape=(2, 3))
    assert [row.tolist() for row in profile.table(4)] == [[0.1, 0.9], [0.3, 0.7, 0.2]]
