"""Tests whose parameters are crossed: a cover of all pairs of values, in place of all combinations."""

from collections import defaultdict
from itertools import combinations


def beyond_pairs(items):
    """What may be left out of tests for every pair of values of a function's parameters to be seen all the same.

    Of a function the case is kept next that has most pairs which were not seen, so that all processes keep the same.
    """
    functions = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            functions[item.parent, item.originalname].append(item)
    beyond = set()
    for cases in functions.values():
        unseen = {case: pairs(case.callspec.params) for case in cases}
        while any(unseen.values()):
            best = max(unseen, key=lambda case: len(unseen[case]))
            seen = unseen.pop(best)
            for others in unseen.values():
                others -= seen
        beyond.update(unseen)
    return beyond


def pairs(params):
    """Every two values of a case, or its one value; a value is told by the object that it is."""
    values = [(name, id(value)) for name, value in params.items()]
    return set(combinations(values, min(2, len(values))))
