"""Layers that share keys: what they lose counts with the heads that hold them, and their bytes count once."""

import numpy as np
import pytest
import torch
from families import make_model
from texts import profiling_prompts as prompts
from transformers import DynamicCache

from redknot_hf import HeadPlan, HeadSpec, cache_argument
from redknot_hf.profiling import HeadProfile, profile_heads
from redknot_hf.profiling.holders import Holders

THREE = Holders((2, 1, 2), (0, 1, 0))


def test_what_was_measured_is_joined_with_what_attends_the_same_keys():
    table = np.arange(10.0).reshape(5, 2)
    assert THREE.by_layer == (2, 1, 0)
    assert THREE.fold(table).tolist() == [[6, 8], [10, 12], [4, 5]]
    assert THREE.fold(table, np.maximum).tolist() == [[6, 7], [8, 9], [4, 5]]
    assert THREE.fold(-table, np.maximum).tolist() == [[0, -1], [-2, -3], [-4, -5]]
    assert (table == np.arange(10.0).reshape(5, 2)).all()


def test_layers_that_share_follow():
    specs = [HeadSpec(), HeadSpec(4, 1), HeadSpec(8, 1)]
    assert THREE.plan(specs) == HeadPlan(((specs[0], specs[1]), (specs[2],), (specs[0], specs[1])))


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_bytes_of_a_plan_are_those_of_the_layers_that_hold_keys(family):
    model = make_model(family)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 9)), **cache_argument(model, cache))
    held = [x for layer in cache.layers if layer.is_initialized for x in (layer.keys, layer.values)]
    assert len(held) == 4
    everything = HeadPlan.uniform(model.config, HeadSpec())
    assert everything.nbytes(9, model.config, torch.float32) == sum(x.nbytes for x in held)


@pytest.mark.parametrize("method", ["drift", "mass", "loss", "gates"])
def test_a_profile_keeps_to_its_budget_where_layers_share_keys(method, tmp_path):
    model = make_model("gemma4")
    holders = Holders.of(model.config)
    assert sum(holders.by_layer) < sum(holders.heads)
    options = {"steps": 2} if method == "gates" else {}
    profile = profile_heads(model, prompts(), method=method, windows=(4,), budget=0.6, **options)
    assert len(profile.errors) == sum(holders.by_layer)
    profile.save(tmp_path / "profile.json")
    plan = HeadProfile.load(tmp_path / "profile.json").plan()
    assert plan == profile.plan()
    everything = HeadPlan.uniform(model.config, HeadSpec()).nbytes(profile.length, model.config, 4)
    assert 0.4 * everything < plan.nbytes(profile.length, model.config, 4) <= 0.6 * everything
    for layer, source in enumerate(holders.sources):
        assert plan[layer] == plan[source]
