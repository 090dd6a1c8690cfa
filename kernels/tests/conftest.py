"""Kernels run in Triton's interpreter where there is no accelerator."""

import importlib.util
import math
import os

import pytest


def pytest_configure(config):
    """Prepares a process that runs tests; one that only hands them to others is waited for, and needs no torch."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        prepare()


def pytest_collection_modifyitems(items):
    """Puts kernels of chips that are not here last: CI fills Triton's cache with them meanwhile."""
    items.sort(key=lambda item: item.path.name == "test_triton_compile.py")


def prepare():
    import torch
    from quick_interpreter import quicken

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before modules are imported
        if importlib.util.find_spec("triton"):
            quicken()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that no kernel wrote holds NaN."""
    import torch

    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _make=make, **k: _poison(_make(*a, **k)))


def _poison(tensor):
    return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor
