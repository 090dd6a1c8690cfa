"""A profile's errors by its method: how many prompts there is time for, and what is said of them."""

from dataclasses import replace

import numpy as np
import pytest
from families import make_model
from texts import profiling_prompts as prompts

from redknot_hf import HeadSpec
from redknot_hf.profiling import HeadProfile, measuring
from redknot_hf.profiling.clock import Clock
from redknot_hf.profiling.drift import drift, measure_drift
from redknot_hf.profiling.mass import measure_mass
from redknot_hf.profiling.prompt import halves

CHOICES = (HeadSpec(4, 2), HeadSpec(12, 2))


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def job(model, seconds=None, some=None, confirming=()):
    said = []
    report = lambda *words: said.append(words)  # noqa: E731
    clock = Clock(seconds)
    return measuring.Job(model, some or prompts(), list(confirming), clock, report, 0.1, 2, None), said


def empty(method, **target):
    zeros = np.zeros((8, 2))
    return HeadProfile(
        method, (4, 4), CHOICES, zeros, (zeros, zeros), length=40, head_dims=((16, 16),) * 2, itemsize=4,
        target=target,
    )  # fmt: skip


def test_mass_is_the_mean_over_prompts_and_halves_take_turns(model):
    work, said = job(model, some=[*prompts(), *prompts()][:3])
    found = measuring.measured(empty("mass"), work)
    mass = measure_mass(model, work.prompts, (4, 12), 2, lambda: None)
    np.testing.assert_array_equal(found.errors, mass.mean(0))
    np.testing.assert_array_equal(found.halves[0], mass[[0, 2]].mean(0))
    np.testing.assert_array_equal(found.halves[1], mass[1])
    assert said == [("mass", i, 3) for i in (1, 2, 3)]


def test_drift_stops_where_time_is_up_but_not_before_there_are_two_prompts(model):
    work, said = job(model, seconds=0.0, some=[*prompts(), *prompts()])
    found = measuring.measured(empty("drift"), work)
    assert said == [("drift", i, len(work.prompts)) for i in range(1, measuring.FEWEST + 1)]
    assert found.provenance["calibration"]["prompts"] == measuring.FEWEST
    sums = measure_drift(model, work.prompts[: measuring.FEWEST], CHOICES, lambda: False)
    np.testing.assert_array_equal(found.errors, drift(sums, [prompt.kind for prompt in work.prompts[: len(sums)]]))


@pytest.mark.parametrize(("stage", "kept", "done"), [("drift", 0.0, 32), ("fisher", 0.0, 32), ("fisher", 32.0, 29)])
def test_a_slow_beginning_takes_no_prompts_away(model, monkeypatch, stage, kept, done):
    """Kernels are compiled in the first prompt, for ten seconds; another takes half of one, and there are sixty."""
    some = prompts(8, 32)
    work, said = job(model, seconds=60.0, some=some, confirming=some)
    ends = [10 + 0.5 * i for i in range(32)]
    monkeypatch.setattr(Clock, "taken", property(lambda self: ends[len(said)]))
    monkeypatch.setattr(Clock, "left", lambda self, reserve: 60 - ends[len(said) - 1] - reserve)
    tick = measuring._ticks(stage, work, kept)
    while len(said) < 32 and not tick():
        pass
    assert len(said) == done


def test_halves_are_of_the_same_kinds(model):
    """Of two kinds in turns every second prompt would be of one."""
    kinds = 2 * ["passkey", "pairs"]
    assert halves(kinds) == ([0, 3], [1, 2])
    assert halves(5 * ["a"]) == ([0, 2, 4], [1, 3])
    some = [replace(prompt, kind=kind) for prompt, kind in zip(prompts(count=4), kinds, strict=True)]
    sums = measure_drift(model, some, CHOICES, lambda: False)
    found = measuring.measured(empty("drift"), job(model, some=some)[0])
    np.testing.assert_array_equal(found.halves[1], drift(sums[[1, 2]], kinds[1:3]))


def test_a_search_for_a_ratio_looks_at_windows_alone(model):
    stored = replace(empty("loss", global_ratio=0.5), choices=(HeadSpec(4, 2), HeadSpec(storage="int8")))
    with pytest.raises(ValueError, match="looks at windows alone: give a budget, or no storages"):
        measuring.measured(stored, job(model)[0])


def test_provenance_says_of_a_folder_only_its_name(model, tmp_path):
    model.config.name_or_path = str(tmp_path / "my-model")
    (tmp_path / "my-model").mkdir()
    found = measuring.provenance_of(model, prompts())
    assert found["model"] == "my-model"
    assert str(tmp_path) not in str(found)
    model.config.name_or_path = "org/model"
    assert measuring.provenance_of(model, prompts())["model"] == "org/model"
    assert found["calibration"]["prompts"] == len(prompts())
    assert found["dtype"] == "float32"
