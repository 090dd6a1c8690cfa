"""Choices for a budget, against all there are."""

import itertools

import numpy as np
import pytest

from redknot_hf.profiling.allocation import allocate, steps


@pytest.mark.parametrize("seed", range(5))
def test_every_step_is_the_best_for_its_bytes(seed):
    rng = np.random.default_rng(seed)
    costs, errors = rng.integers(1, 20, (4, 4)).astype(float), rng.exponential(size=(4, 4)) ** 3
    every = [
        (costs[range(4), picks].sum(), errors[range(4), picks].sum())
        for picks in itertools.product(range(4), repeat=4)
    ]
    picks, order = steps(costs, errors)
    heads = np.arange(4)
    assert costs[heads, picks].sum() == costs.min(1).sum()
    for step in [None, *order]:
        if step is not None:
            picks[step.head] = step.choice
        spent, error = costs[heads, picks].sum(), errors[heads, picks].sum()
        assert error == pytest.approx(min(e for cost, e in every if cost <= spent))
        found = allocate(costs, errors, float(spent))
        assert errors[heads, found].sum() <= error + 1e-12
    assert errors[heads, picks].sum() == pytest.approx(errors.min(1).sum())


def test_what_is_left_is_spent():
    costs, errors = np.array([[1.0, 9.0], [1.0, 3.0]]), np.array([[5.0, 0.0], [1.0, 0.0]])
    assert allocate(costs, errors, 9.0).tolist() == [0, 1], "the better step is too dear"
    assert allocate(costs, errors, 10.0).tolist() == [1, 0]


def test_a_budget_under_the_cheapest_choices_is_told():
    with pytest.raises(ValueError, match="the cheapest choices take 2, of 1"):
        allocate(np.ones((2, 2)), np.ones((2, 2)), 1.0)
