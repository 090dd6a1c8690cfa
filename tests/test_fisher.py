"""Fisher's errors: the curvature of the divergence, drawn."""

from functools import partial

import numpy as np
import pytest
import torch
from families import make_model, make_model_with_idle_heads
from oracle import choices
from texts import profiling_prompts as prompts

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import fisher as module
from redknot_hf.profiling import mixture as mixture_module
from redknot_hf.profiling import profile_heads
from redknot_hf.profiling.divergence import Divergence
from redknot_hf.profiling.fisher import fisher, measure_fisher
from redknot_hf.profiling.holders import Holders
from redknot_hf.profiling.mixture import Mixture, mixed_in
from redknot_hf.profiling.prompt import Prompt

CHOICES = choices(4, 12)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_it_foretells_the_divergence_of_small_changes(family, monkeypatch):
    """A little of a choice mixed into one head: the KL grows with the square of how little, as fast as foretold."""
    monkeypatch.setattr(module, "_DRAWN", 200)
    model, some = make_model(family), prompts(count=1)
    (errors,), _ = measure_fisher(model, some, CHOICES, lambda: False)
    dense, small = Divergence(model, some), 0.02
    for head in np.argsort(errors[:, 0])[-2:]:
        mixture = Mixture(model, HeadPlan.uniform(model.config, HeadSpec()), CHOICES)
        layer, place = divmod(int(head), model.config.num_key_value_heads)
        with torch.no_grad():
            mixture.shares[layer][place, 0] = small
        with mixed_in(model, mixture):
            kl = float(dense.loss(0).detach())
        assert errors[head, 0] == pytest.approx(kl / small**2, rel=0.3)


def test_who_does_nothing_costs_nothing():
    model = make_model_with_idle_heads()
    found = measure_fisher(model, prompts(count=2), CHOICES, lambda: False)
    errors = Holders.of(model.config).fold(fisher(found, ["a", "a"]))
    idle = [head for head in range(len(errors)) if errors[head].max() < 1e-12]
    assert 0 < len(idle) < len(errors)
    profile = profile_heads(model, prompts(count=4), windows=(4, 12), budget=0.5, method="fisher")
    specs = [spec for layer in profile.plan() for spec in layer]
    assert all(specs[head].window == 4 for head in idle)
    assert profile.plan().provenance["method"] == "fisher"


def test_kinds_that_the_model_cannot_do_are_left_out():
    errors = np.array([[[1.0]], [[3.0]], [[100.0]], [[7.0]]])
    right, kinds = np.array([0.5, 0.0, 0.05, 0.0]), ["copy", "copy", "repeats", "text"]
    assert fisher((errors, right), kinds).item() == pytest.approx(11 / 3)
    assert fisher((errors[2:3], right[2:3]), ["repeats"]).item() == 100


def test_it_stops_where_it_is_told_to_and_nan_is_told():
    model = make_model("llama")
    errors, right = measure_fisher(model, prompts(count=3), CHOICES, lambda: True)
    assert errors.shape == (1, 8, 2)
    assert right.shape == (1,)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        measure_fisher(model, [Prompt(prompts()[0].ids)], CHOICES, lambda: False)


def test_layers_that_are_computed_again_find_the_same(monkeypatch):
    """As for large models, whose activations are not held: each of the backward passes makes them anew."""
    model, some = make_model("llama"), prompts(count=1)
    held, _ = measure_fisher(model, some, CHOICES, lambda: False)
    monkeypatch.setattr(mixture_module, "_LARGE", 0)
    layer = model.model.layers[0]
    layer.forward = hooked = partial(type(layer).forward, layer)  # as accelerate's hooks are, of layers over devices
    again, _ = measure_fisher(model, some, CHOICES, lambda: False)
    np.testing.assert_allclose(again, held, rtol=1e-3, atol=1e-9)
    assert vars(layer)["forward"] is hooked
    assert not any("forward" in vars(other) for other in model.model.layers[1:])
