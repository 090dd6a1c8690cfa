"""A handle answers questions about itself, and refuses every operation that would read what is not there."""

import pytest
import torch
from families import make_model

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache
from redknot_hf.cache.handle import RedKnotHandle


@pytest.fixture
def handle():
    config = make_model("llama").config
    cache = RedKnotCache(config, HeadPlan.uniform(config, HeadSpec()))
    key, value = cache.update(torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16), 0)
    assert key.redknot is value.redknot
    return key


def test_metadata_can_be_asked(handle):
    assert isinstance(handle, RedKnotHandle)
    assert isinstance(handle, torch.Tensor)
    assert handle.shape == handle.size() == (2, 4, 5, 16)
    assert handle.shape[-2] == handle.size(-2) == 5
    assert (handle.ndim, handle.dim(), len(handle), handle.numel()) == (4, 4, 2, 640)
    assert (handle.dtype, handle.device, handle.layout) == (torch.float32, torch.device("cpu"), torch.strided)
    assert (handle.is_cuda, handle.requires_grad, handle.is_floating_point()) == (False, False, True)
    assert (handle.stride()[-1], handle.element_size()) == (1, 4)


@pytest.mark.parametrize("show", [repr, str])
def test_repr_shows_no_element(handle, show):
    assert show(handle) == "RedKnotHandle(shape=(2, 4, 5, 16), dtype=torch.float32, device=cpu)"


def test_moving_to_where_it_is_changes_nothing(handle):
    assert handle.to(torch.device("cpu")) is handle


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("matmul", lambda x: torch.matmul(torch.ones(5, 5), x)),
        ("transpose", lambda x: x.transpose(1, 2)),
        ("reshape", lambda x: x.reshape(-1)),
        ("__getitem__", lambda x: x[:, :1]),
        ("cat", lambda x: torch.cat([x, x])),
        ("add", lambda x: x + 1),
        ("to", lambda x: x.to(torch.float64)),
        ("contiguous", lambda x: x.contiguous()),
        ("clone", lambda x: x.clone()),
        ("sum", lambda x: x.sum()),
        (
            "scaled_dot_product_attention",
            lambda x: torch.nn.functional.scaled_dot_product_attention(torch.ones(2, 4, 5, 16), x, x),
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_operations_name_themselves_and_the_fix(handle, name, operation):
    with pytest.raises(RuntimeError, match=rf"{name} was called .*set_attn_implementation\('redknot'\).*DynamicCache"):
        operation(handle)
