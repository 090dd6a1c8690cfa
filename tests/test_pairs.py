"""Of parameters that are crossed, every pair of values is kept."""

from itertools import product
from types import SimpleNamespace

import pytest
from pairs import beyond_pairs, pairs


class Case:
    """A test as pytest collects it, of one function."""

    parent, originalname = None, "test"

    def __init__(self, **params):
        self.callspec = SimpleNamespace(params=params)


@pytest.mark.parametrize(("sizes", "most"), [((5,), 5), ((3, 4), 12), ((4, 2, 3), 12), ((5, 6, 3, 3, 2), 36)], ids=str)
def test_a_cover_has_every_pair_and_few_cases(sizes, most):
    values = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcde", sizes, strict=False)]
    cases = [Case(**dict(zip("abcde", chosen, strict=False))) for chosen in product(*values)]
    beyond = beyond_pairs([*cases, SimpleNamespace()])  # the last one has no parameters
    kept = [case for case in cases if case not in beyond]
    every, seen = (set().union(*(pairs(case.callspec.params) for case in some)) for some in (cases, kept))
    assert seen == every
    assert len(kept) <= most


def test_functions_are_covered_each_for_itself():
    first, second = Case(a=1, b=2, c=3), Case(a=1, b=2, c=3)
    second.originalname = "other"
    again = Case(a=1, b=2, c=3)
    assert beyond_pairs([first, second, again]) == {again}
