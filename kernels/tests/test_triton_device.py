"""Kernels are launched where their tensors are."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from redknot_kernels.triton import pages as triton_pages


@pytest.mark.parametrize("index", [0, 1])
def test_a_launch_makes_the_device_of_the_first_argument_the_current_one(index, monkeypatch):
    current = [0]

    @contextmanager
    def device_index(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current[-1])
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    launch = triton_pages.on_its_device(lambda first, more: (current[-1], more))
    assert launch(SimpleNamespace(device=torch.device("cuda", index)), more=3) == (index, 3)
    assert current == [0]


def test_the_cpu_needs_the_interpreter(monkeypatch):
    launch = triton_pages.on_its_device(lambda first: 5)
    monkeypatch.setattr(triton_pages, "INTERPRETING", True)
    assert launch(torch.ones(1)) == 5
    monkeypatch.setattr(triton_pages, "INTERPRETING", False)
    with pytest.raises(ValueError, match="impl='triton' on a model on the CPU"):
        launch(torch.ones(1))
