"""Kernels run in Triton's interpreter where there is no accelerator."""

import importlib.util
import os

import pytest
import torch
from quick_interpreter import quicken

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before the modules are imported
    if importlib.util.find_spec("triton"):
        quicken()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that no kernel wrote holds NaN."""
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _make=make, **k: _poison(_make(*a, **k)))


def _poison(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor
