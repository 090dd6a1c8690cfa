"""From a plan's specs to the kernels' rules."""

import pytest
from redknot_kernels import UNBOUNDED

from redknot_hf import HeadSpec
from redknot_hf.plan.rules import head_rules, local_specs

SPECS = (HeadSpec(), HeadSpec(window=20, sink=3), HeadSpec(window=100, sink=2))


def test_a_full_attention_layer_takes_the_plan_as_it_is():
    rules = head_rules(SPECS, page_size=16, sliding_window=None, slack=0)
    assert rules.window == (UNBOUNDED, 20, 100)
    assert rules.sink == (0, 3, 2)
    assert rules.global_heads == (0,)
    assert rules.max_pages[1:] == (3, 8)


def test_the_models_window_cuts_every_head():
    rules = head_rules(SPECS, page_size=16, sliding_window=64, slack=0)
    assert rules.window == (64, 20, 64)
    assert rules.sink == (0, 3, 0), "a head as wide as the model sees no sink behind it"
    assert rules.reach == 64
    assert rules.global_heads == ()


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 63, 64, 65, 128])
@pytest.mark.parametrize("sink", [0, 1, 4, 16])
def test_a_ring_has_room_for_a_page_and_wastes_less_than_two(page_size, window, sink):
    rules = head_rules((HeadSpec(window, sink),), page_size, None, slack=0)
    assert rules.ring[0] >= window + page_size
    assert rules.max_pages[0] * page_size - (window + sink) < 2 * page_size


def test_recording_widens_the_rings():
    narrow, wide = (head_rules(SPECS, 16, None, slack) for slack in (0, 512))
    assert wide.slack >= 512 > narrow.slack >= 16


def test_all_heads_are_local_to_one_process():
    assert local_specs(SPECS, 3) == SPECS
    with pytest.raises(ValueError, match=r"the plan has 3 KV heads for a layer whose keys have 2.*HeadPlan\.uniform"):
        local_specs(SPECS, 2)
