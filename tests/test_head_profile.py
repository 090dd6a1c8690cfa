import numpy as np
import pytest

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import HeadProfile


def make(errors, windows=(4, 16), halves=None, shape=(2, 2), **more):
    errors = np.array(errors, dtype=float)
    halves = (errors, errors) if halves is None else tuple(np.array(half, dtype=float) for half in halves)
    return HeadProfile("drift", shape, windows, 1, errors, halves, length=100, token_bytes=8, **more)


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
    looser = [profile.plan(max_error=error) for error in (0, *np.unique(ERRORS))]
    assert share == max(s for p in looser if (s := p.nbytes(100, 1, 4) / 3200) <= budget)
    assert plan == profile.plan(bytes_per_token=budget * 4 * 8)


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


def test_errors_must_be_finite_and_fit():
    with pytest.raises(ValueError, match="must be finite"):
        make([[0.1, 0.05], [0.9, np.nan], [0.3, 0.02], [0.7, 0.4]])
    with pytest.raises(ValueError, match="each of 4 heads"):
        make([[0.1, 0.05]])


def test_a_table_by_layer():
    profile = make([*ERRORS, [0.2, 0.1]], shape=(2, 3))
    assert [row.tolist() for row in profile.table(4)] == [[0.1, 0.9], [0.3, 0.7, 0.2]]
