"""The search on errors that are known: heads that add up, and heads that stand in for each other."""

import numpy as np
import pytest

from redknot_hf.profiling import search
from redknot_hf.profiling.search import find_path, measure_path, refine


class Counted:
    """An error of restricted heads: the sum of their costs, and more where all of a group are restricted."""

    def __init__(self, costs, groups=()):
        self.costs, self.groups, self.calls = costs, groups, 0

    def __call__(self, heads):
        self.calls += 1
        groups = sum(cost for group, cost in self.groups if group <= set(heads))
        return float(sum(self.costs[head] for head in heads) + groups)


@pytest.mark.parametrize("heads", [1, 2, 7, 32, 100])
def test_costs_that_add_up_are_sorted(heads):
    rng = np.random.default_rng(heads)
    costs = rng.exponential(size=heads) ** 3
    measure = Counted(costs)
    path = find_path(measure, rng.permutation(heads).tolist())
    assert sorted(path.heads) == list(range(heads))
    assert path.errors == sorted(path.errors)
    assert path.errors[-1] == pytest.approx(costs.sum())
    # Only what costs next to nothing may stand in the prior's order.
    late = [costs[head] for head, error in zip(path.heads, path.errors, strict=True) if error > 0.03 * costs.sum()]
    assert late == sorted(late)


def test_one_of_two_heads_that_stand_in_for_each_other_is_kept():
    costs = np.full(20, 0.01)
    measure = Counted(costs, [({3, 7}, 5.0)])
    path = find_path(measure, list(range(20)))
    assert path.heads[-1] in (3, 7)
    assert path.errors[-2] == pytest.approx(0.19)


def test_a_search_takes_far_fewer_steps_than_greedy():
    measure = Counted(np.arange(256.0) ** 4)
    find_path(measure, list(range(256)))
    assert measure.calls < 256 * 4


def test_out_of_time_the_last_order_stands():
    costs = np.arange(40.0)
    measure = Counted(costs)
    path = find_path(measure, list(range(40))[::-1], seconds=0)
    assert sorted(path.heads) == list(range(40))
    assert path.errors[-1] == costs.sum()
    assert measure.calls < 60
    assert not path.finished
    assert find_path(measure, list(range(40))).finished


def test_heads_that_a_round_had_no_time_for_stay_behind_in_their_order(monkeypatch):
    costs = np.ones(40)
    costs[:20] = np.random.default_rng(0).uniform(1, 2, 20)
    measure = Counted(costs)
    monkeypatch.setattr(search.time, "perf_counter", lambda: measure.calls)
    path = find_path(measure, list(range(40)), seconds=20)
    assert measure.calls < 25
    tried = [head for head in path.heads if head < 10]
    assert tried != sorted(tried)
    assert path.heads[20:] == list(range(20, 40))


def test_a_known_order_is_measured_at_some_points():
    measure = Counted(np.ones(10))
    path = measure_path(measure, list(range(10)), 5)
    assert measure.calls == 5
    assert path.errors == pytest.approx(list(range(1, 11)))
    assert measure_path(Counted(np.ones(3)), [2, 0, 1], 16).heads == [2, 0, 1]


def test_refining_swaps_what_is_better():
    costs = np.array([0, 0, 9, 1, 2, 5])
    assert set(refine(Counted(costs), [0, 1, 2], [3, 4, 5])) == {0, 1, 3}
    assert refine(Counted(costs), [0, 1, 3], [2, 4, 5]) == [0, 1, 3]
    assert refine(Counted(costs), [0, 1, 2], [3, 4, 5], seconds=0) == [0, 1, 2]
    assert refine(Counted(costs), [0, 1], []) == [0, 1]


def test_refining_goes_on_while_swaps_are_better():
    costs = np.random.default_rng(1).exponential(size=32) ** 2
    measure = Counted(costs)
    assert set(refine(measure, list(range(16)), list(range(16, 32)))) == set(np.argsort(costs)[:16])
    assert measure.calls < 300


def test_refining_finds_what_only_a_swap_betters():
    # Restricting one of the pair costs nothing while the other is global.
    measure = Counted([0, 0, 0.1, 3, 4], [({0, 1}, 5.0)])
    assert set(refine(measure, [0, 1], [2, 3, 4])) in ({0, 2}, {1, 2})
