"""Caches of mixed storages under whatever may happen to them, in any order. REDKNOT_WALK says how many turns."""

import os

import pytest
from cold_walk import Walk

TURNS = int(os.environ.get("REDKNOT_WALK", "1800"))
SEEDS = 3


@pytest.mark.parametrize("seed", range(SEEDS))
def test_caches_hold_what_they_must_after_every_turn(seed):
    walk = Walk(seed)
    for _ in range(TURNS // SEEDS):
        walk.turn()
    assert len(walk.done) == 13  # every kind of turn
    assert walk.cold > TURNS // SEEDS // 3
