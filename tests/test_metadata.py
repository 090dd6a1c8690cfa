"""Questions about a tensor that touch no element."""

import pytest
import torch

from redknot_hf.metadata import METADATA


class Recorder(torch.Tensor):
    """Remembers which functions were called on it."""

    called: list

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("ask", "answered"),
    [
        (lambda x: x.shape, True),
        (lambda x: (x.dtype, x.device, x.ndim, x.is_cuda), True),
        (lambda x: (x.size(0), x.dim(), len(x), x.stride()), True),
        (lambda x: x + 1, False),
        (lambda x: x.mT, False),
        (lambda x: x[0], False),
    ],
)
def test_metadata_is_told_from_work(ask, answered):
    Recorder.called = []
    ask(torch.zeros(2, 3).as_subclass(Recorder))
    assert all(func in METADATA for func in Recorder.called) == answered
