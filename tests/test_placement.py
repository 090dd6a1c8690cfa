"""An order of KV heads in which ranks hold about as many bytes."""

import random

import pytest
from families import make_model

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.plan.placement import leveled

GLOBAL, LOCAL = HeadSpec(), HeadSpec(256, 4)


def plan_of(layers: int, heads: int, share: float, seed: int, specs=(GLOBAL,)) -> HeadPlan:
    chosen = random.Random(seed)
    return HeadPlan(
        [[chosen.choice(specs) if chosen.random() < share else LOCAL for _ in range(heads)] for _ in range(layers)]
    )


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("share", [0.05, 0.125, 0.5])
def test_ranks_hold_the_same_bytes(ranks, share):
    """Of the 8B shape, wherever global heads lie: within 5 % where there is enough to share, never a head apart."""
    for seed in range(5):
        specs = (HeadSpec(), HeadSpec(storage="int8"), HeadSpec(storage="int4"), HeadSpec(4096, 4))
        plan = plan_of(32, 8, share, seed, specs)
        placement = plan.balanced(ranks, 32768)
        apart = max(placement.nbytes) - min(placement.nbytes)
        assert apart <= max(0.05 * min(placement.nbytes), HeadSpec().nbytes(32768, 128, 128, 2))
        assert share < 0.5 or apart <= 0.05 * min(placement.nbytes)
        assert sum(placement.nbytes) == plan.nbytes(32768, 128, "bfloat16")
        assert placement.nbytes[placement.fullest] == max(placement.nbytes)


def test_an_order_has_every_head_once_and_says_what_each_rank_holds():
    plan = plan_of(6, 8, 0.3, 0)
    placement = plan.balanced(4, 8192, 64)
    for layer, places, ordered in zip(plan, placement.order, placement.plan, strict=True):
        assert sorted(places) == list(range(8))
        assert ordered == tuple(layer[head] for head in places)
    mine = [HeadPlan([layer[2 * r : 2 * r + 2] for layer in placement.plan]).nbytes(8192, 64, 2) for r in range(4)]
    assert tuple(mine) == placement.nbytes


def test_global_heads_of_one_layer_go_to_different_ranks():
    plan = HeadPlan([[HeadSpec(), HeadSpec(), LOCAL, LOCAL]] * 3)
    for layer in plan.balanced(2, 32768).plan:
        assert [spec.is_global for spec in layer].count(True) == 2
        assert [any(spec.is_global for spec in layer[r : r + 2]) for r in (0, 2)] == [True, True]


def test_what_is_level_stays_in_order():
    plan = HeadPlan([[HeadSpec()] * 4, [LOCAL] * 4])
    assert plan.balanced(2, 1000).order == ((0, 1, 2, 3),) * 2


def test_exchanges_level_what_dealing_leaves():
    costs = [[9, 1, 1, 1], [5, 4, 1, 1], [7, 2, 2, 2]]
    order, sums = leveled(costs, 2, (0, 1, 2))
    assert abs(sums[0] - sums[1]) <= 2
    found = [sum(costs[i][h] for i in range(3) for h in order[i][2 * r : 2 * r + 2]) for r in (0, 1)]
    assert tuple(found) == sums


def test_layers_that_share_keys_stand_in_one_order():
    config = make_model("gemma4").config
    plan = HeadPlan([[LOCAL, LOCAL, HeadSpec(), HeadSpec()]] * 4)
    order = plan.balanced(2, 500, config).order
    assert order[2:] == order[:2]
    assert order[0] != (0, 1, 2, 3)


@pytest.mark.parametrize("ranks", [0, 3])
def test_ranks_that_do_not_divide_the_heads_are_refused(ranks):
    with pytest.raises(ValueError, match="ranks"):
        plan_of(2, 4, 0.5, 0).balanced(ranks, 100)
