"""A handle answers questions about itself, and refuses every operation that would read what is not there."""

import copy

import pytest
import torch
from families import make_model
from oracle import masked_logits, random_plan
from texts import prompts

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument
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


def test_moved_to_another_device_it_is_of_the_same_step(handle):
    moved = handle.to(torch.device("meta"), non_blocking=True)
    assert isinstance(moved, RedKnotHandle)
    assert moved.redknot is handle.redknot
    assert (moved.device.type, moved.shape) == ("meta", handle.shape)
    assert moved.redknot.value.device.type == "cpu", "where the rows are"


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


def copied(model, while_it_ran):
    model.set_attn_implementation(while_it_ran)
    config = copy.deepcopy(model.config)
    model.set_attn_implementation("redknot")
    return config


STRANGERS = {
    "copied while the model ran SDPA": lambda model: copied(model, "sdpa"),
    "copied while the model ran eager attention": lambda model: copied(model, "eager"),
    "copied as it is": lambda model: copied(model, "redknot"),
    "of a file": lambda model: type(model.config)(**model.config.to_dict()),
    "of another instance": lambda model: (
        type(model)._from_config(copy.deepcopy(model.config), attn_implementation="sdpa").config
    ),
}


@pytest.mark.parametrize("reserved", [None, 80])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_sliding"])
@pytest.mark.parametrize("config", STRANGERS)
def test_the_config_need_not_be_the_running_models_own(config, family, reserved):
    model = make_model(family)
    config = STRANGERS[config](model)
    plan = random_plan(config)
    cache = RedKnotCache(config, plan, page_size=16, max_cache_len=reserved)
    ids, mask = prompts(2, 45, padding=(0, 6))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def step(a, b):
        step = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
        return model(ids[:, a:b], **step, **cache_argument(model, cache)).logits

    real = mask.bool()
    with torch.no_grad():
        found = torch.cat([step(0, 40), step(40, 44), step(44, 45)], 1)[real]
        torch.testing.assert_close(found, masked_logits(model, plan, ids, mask)[real], atol=2e-4, rtol=1e-4)
        model.set_attn_implementation("sdpa")  # whatever the cache's config says
        with pytest.raises((ValueError, RuntimeError), match=r"model\.set_attn_implementation\('redknot'\)"):
            step(44, 45)
    assert {layer.get_seq_length() for layer in cache.layers} == {45}
