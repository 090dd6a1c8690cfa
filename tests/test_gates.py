import numpy as np
import pytest
import torch
from families import make_model, make_model_with_idle_heads
from texts import profiling_prompts as prompts

from redknot_hf import HeadSpec
from redknot_hf.attention.watching import watching
from redknot_hf.profiling import profile_heads
from redknot_hf.profiling.divergence import Divergence
from redknot_hf.profiling.gates import Gates, train_gates


@pytest.fixture(scope="module")
def model():
    return make_model_with_idle_heads()


def test_gates_of_heads_that_do_nothing_close(model):
    profile = profile_heads(model, prompts(), windows=(3,), method="gates", steps=25, global_ratio=0.75)
    assert set(np.argsort(profile.errors[:, 0])[:2]) == {2, 4}
    assert profile.plan().num_global == 6
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_sliding"])
def test_the_gradient_is_that_of_differences(family):
    model = make_model(family, dtype=torch.float64, num_hidden_layers=2)
    gates = Gates(Divergence(model, prompts()), HeadSpec(3, 1), [0])
    gates.logits = torch.linspace(-1, 1, 8, dtype=torch.float64, requires_grad=True)

    def loss():
        with watching(model, gates):
            return gates.divergence.loss(0)

    loss().backward()
    for head in (1, 6):
        with torch.no_grad():
            gates.logits[head] += 1e-2
            above = loss()
            gates.logits[head] -= 2e-2
            below = loss()
            gates.logits[head] += 1e-2
        assert gates.logits.grad is not None
        assert float(gates.logits.grad[head]) == pytest.approx(float(above - below) / 2e-2, rel=0.03, abs=1e-6)


def test_training_goes_on_where_it_stopped(model, tmp_path):
    spec, path = HeadSpec(3, 1), tmp_path / "gates.pt"
    whole = train_gates(model, prompts(), spec, 6, lambda: None)
    steps = []
    stopped = iter(range(5))
    with pytest.raises(RuntimeError, match="StopIteration"):  # a run that is broken off
        train_gates(model, prompts(), spec, 6, lambda: next(stopped), path=path)
    assert not path.exists()
    train_gates(model, prompts(), spec, 6, lambda: None, seconds=0, path=path)
    again = train_gates(model, prompts(), spec, 6, lambda: steps.append(1), path=path)
    for first, second in zip(whole, again, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5)
    assert len(steps) == 12
    train_gates(model, prompts(), spec, 6, lambda: steps.append(1), path=path)
    assert len(steps) == 12
    with pytest.raises(ValueError, match="holds gates of"):
        train_gates(model, prompts(50), spec, 6, lambda: None, path=path)


def test_gates_are_for_one_window(model):
    with pytest.raises(ValueError, match="one window"):
        profile_heads(model, prompts(), windows=(3, 5), method="gates")
