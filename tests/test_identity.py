import copy

import pytest
import torch
from families import make_model
from peft import LoraConfig, get_peft_model
from torch import nn

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.reuse.identity import model_identity, segment_address, weights_state


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=2)


def test_the_same_model_has_the_same_identity(model):
    twin = make_model("llama", num_hidden_layers=2)
    twin.set_attn_implementation("sdpa")
    twin.config._name_or_path = "elsewhere"
    assert model_identity(model) == model_identity(twin) == model_identity(copy.deepcopy(model).train())


def swap(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()


def one_bit(model):
    model.lm_head.weight.view(torch.int32)[-1, -1] ^= 1


def rope(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def window(model):
    model.config.rms_norm_eps *= 2


def dtype(model):
    model.bfloat16()


def neighbours(model):
    """Whole numbers whose sum and whose sum by place stay."""
    bits = model.model.layers[0].self_attn.v_proj.weight.view(-1).view(torch.int32)
    bits[:3] += torch.tensor([1, -2, 1], dtype=torch.int32) << 22


def far_apart(model):
    """Two elements whose places are the same modulo 65521."""
    weight = model.get_buffer("far")
    weight[0], weight[65521] = weight[65521].clone(), weight[0].clone()


@pytest.mark.parametrize("change", [swap, one_bit, neighbours, far_apart, rope, window, dtype])
def test_any_change_of_the_model_shows(model, change):
    other = copy.deepcopy(model)
    other.register_buffer("far", torch.arange(70_000.0))
    before = model_identity(other), weights_state(other)
    with torch.no_grad():
        change(other)
    assert model_identity(other) != before[0]
    if change is not window:  # a config is not looked at between two passes
        assert weights_state(other) != before[1]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
def test_adapters_show():
    model = get_peft_model(make_model("llama", num_hidden_layers=1), LoraConfig(target_modules=["q_proj"]))
    on = model_identity(model), weights_state(model)
    with model.disable_adapter():
        assert model_identity(model) != on[0]
        assert weights_state(model) != on[1]
    assert (model_identity(model), weights_state(model)) == on


def test_all_kinds_of_weights_are_read():
    module = nn.Module()
    kinds = (torch.bool, torch.uint8, torch.int64, torch.float64, torch.complex64, torch.float8_e4m3fn)
    for i, kind in enumerate(kinds):
        module.register_buffer(f"b{i}", torch.zeros(3).to(kind))
    before = model_identity(module)
    for i, kind in enumerate(kinds):
        changed = copy.deepcopy(module)
        changed.get_buffer(f"b{i}").copy_(torch.tensor([0.0, 1.0, 0.0]).to(kind))
        assert model_identity(changed) != before, kind
    module.register_buffer("away", torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="identity='name and revision'"):
        model_identity(module)


def test_an_address_is_that_of_all_it_depends_on(model):
    plan = HeadPlan.uniform(model.config, HeadSpec(4, 1))
    base = ("id", plan, "plan", [1, 2, 3], [])
    other = HeadPlan.uniform(model.config, HeadSpec(5, 1))
    changed = [("od", 0), (other, 1), ("full", 2), ([1, 2], 3), ([0], 4)]
    all_of_them = {segment_address(*base)}
    all_of_them |= {segment_address(*[new if i == at else x for i, x in enumerate(base)]) for new, at in changed}
    all_of_them.add(segment_address("id", plan, "plan", [2, 3], [1]))  # the prefix does not run into the text
    assert len(all_of_them) == 7
    assert segment_address("id", plan, "plan", (1, 2, 3), ()) == segment_address(*base)
