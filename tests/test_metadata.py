"""Questions about a tensor, told from work with it."""

import pytest
import torch

from redknot_hf.cache.handle import is_answer


class Recorder(torch.Tensor):
    """Remembers what was called on it, and what it returned."""

    called: list

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        cls.called.append((func, out))
        return out


@pytest.mark.parametrize(
    ("ask", "answered"),
    [
        (lambda x: x.shape, True),
        (lambda x: (x.dtype, x.device, x.ndim, x.is_cuda, x.is_leaf, x.grad), True),
        (lambda x: (x.size(0), x.dim(), len(x), x.stride(), x.untyped_storage()), True),
        (lambda x: x._base, True),
        (lambda x: x + 1, False),
        (lambda x: x.mT, False),
        (lambda x: x[0], False),
        (lambda x: x.chunk(2), False),
        (lambda x: x.sort(), False),
    ],
)
def test_questions_are_told_from_work(ask, answered):
    Recorder.called = []
    ask(torch.zeros(2, 3)[:, :2].as_subclass(Recorder))
    assert Recorder.called
    assert all(is_answer(*call) for call in Recorder.called) == answered
