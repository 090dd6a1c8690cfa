"""Swaps of choices: led by gradients, decided by the divergence."""

from dataclasses import replace

import numpy as np
import pytest
from families import make_model, make_model_with_idle_heads
from oracle import choices
from texts import profiling_prompts as prompts

from redknot_hf.profiling import profile_heads
from redknot_hf.profiling.clock import Clock
from redknot_hf.profiling.divergence import Divergence
from redknot_hf.profiling.swaps import SwapSearch

CHOICES = choices(4, 12)
COSTS = np.tile([4.0, 12.0, 40.0], (8, 1))
ERRORS = np.tile([0.02, 0.01, 0.0], (8, 1))
KINDS = ["passkey", "pairs", "repeats", "text"]


def search(model, count=4):
    return SwapSearch(model, prompts(count=count), CHOICES, COSTS, ERRORS, lambda passes: None)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_slopes_are_those_of_the_divergence(family):
    """Of the whole model the KL has its least value; from a poor plan the steepest changes better it."""
    model = make_model(family)
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    found = SwapSearch(
        model, prompts(), CHOICES, *(np.tile(x[:1], (heads, 1)) for x in (COSTS, ERRORS)), lambda passes: None
    )
    assert np.abs(found._slopes(np.full(heads, 2))).max() < 1e-4
    slopes = found._slopes(np.zeros(heads, dtype=int))
    assert np.abs(slopes[:, 0]).max() == 0, "what a head does already"
    before = float(found.divergence(found._plan(np.zeros(heads, dtype=int)), found.proposing).mean())
    best = np.zeros(heads, dtype=int)
    best[np.argsort(slopes[:, 2])[: heads // 4]] = 2
    assert float(found.divergence(found._plan(best), found.proposing).mean()) < before


def test_swaps_keep_the_bytes_and_lower_the_divergence():
    model = make_model_with_idle_heads()
    found = search(model)
    begun = np.array([0, 0, 2, 0, 2, 0, 0, 0])  # the idle ones have it all
    picks = found.run(begun, 112.0, Clock(None))
    assert found.finished
    assert COSTS[np.arange(8), picks].sum() <= 112
    assert found.kl == sorted(found.kl, reverse=True)
    assert found.kl[-1] < 0.97 * found.kl[0]
    assert float(found.divergence(found._plan(picks), found.deciding).mean()) == pytest.approx(found.kl[-1])


def test_both_halves_are_of_all_kinds_that_the_model_can_do(monkeypatch):
    """Every second prompt of an even number of kinds in turns, as calibration makes, would be of every other kind."""
    some = [replace(prompt, kind=kind) for prompt, kind in zip(prompts(8, 12), 3 * KINDS, strict=True)]
    right = np.tile([0.5, 0.9, 0.01, 0.2], 3)
    monkeypatch.setattr(Divergence, "right", lambda self: right)
    found = SwapSearch(make_model("llama"), some, CHOICES, COSTS, ERRORS, lambda passes: None)
    for half in (found.proposing, found.deciding):
        assert {some[i].kind for i in half} == {"passkey", "pairs", "text"}
    assert sorted(found.proposing + found.deciding) == [i for i in range(12) if i % 4 != 2]
    right[:] = 0.0  # it can do none but running text, of which there are three
    found = SwapSearch(make_model("llama"), some, CHOICES, COSTS, ERRORS, lambda passes: None)
    assert (found.proposing, found.deciding) == ([3, 11], [7])


def test_out_of_time_the_plan_stays():
    found = search(make_model("llama"), 2)
    begun = np.zeros(16, dtype=int)
    found.costs, found.errors = (np.tile(x[:1], (16, 1)) for x in (COSTS, ERRORS))
    assert (found.run(begun, 1000.0, Clock(0)) == begun).all()
    assert not found.finished


def test_a_profile_by_loss_holds_its_budget_and_is_no_worse_than_fisher():
    model = make_model("llama")
    options = {"windows": (4, 12), "budget": 0.4}
    loss = profile_heads(model, prompts(count=6), method="loss", **options)
    plan = loss.plan()
    assert plan.nbytes(40, 16, 4) <= 0.4 * 16 * 40 * 32 * 4
    assert loss.provenance["kl_by_swaps"] == sorted(loss.provenance["kl_by_swaps"], reverse=True)
    fisher = profile_heads(model, prompts(count=6), method="fisher", **options)
    deciding = Divergence(model, [prompt for i, prompt in enumerate(prompts(count=6)) if i != 3][1::2])
    assert deciding(plan).mean() <= deciding(fisher.plan()).mean() + 1e-6
    assert loss.plan(budget=0.6) == fisher.plan(budget=0.6), "other budgets follow fisher"
