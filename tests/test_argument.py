"""The name by which a model takes its cache, asked in one place."""

import logging

import accelerate
import peft
import pytest
import torch
import transformers
from families import make_model
from packaging.version import Version
from torch import nn
from transformers import DynamicCache

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument, captured_decoding
from redknot_hf.cache.argument import OF_GENERATE

pytestmark = pytest.mark.core
RENAMED = Version(transformers.__version__) >= Version("5.24")
IDS = torch.arange(3, 41)[None]


class Older(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return past_key_values


class Newer(nn.Module):
    def forward(self, input_ids, *, cache=None):
        return cache


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.Sequential, Wrapper, nn.DataParallel, compiled, "hooked", "nothing"])
@pytest.mark.parametrize(("make", "name"), [(Older, "past_key_values"), (Newer, "cache")])
def test_the_model_itself_is_asked_through_whatever_wraps_it(make, name, wrap):
    model = make()
    if wrap == "hooked":
        accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    elif wrap != "nothing":
        model = wrap(model)
    cache = DynamicCache()
    assert cache_argument(model, cache) == {name: cache}
    assert cache_argument(model, None) == {name: None}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize("adapted", [False, True])
def test_models_of_transformers_changed_the_name(adapted):
    model = make_model("llama")
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert [OF_GENERATE] == list(cache_argument(model, None)) == ["cache" if RENAMED else "past_key_values"]


def test_a_model_without_a_cache_is_named():
    with pytest.raises(TypeError, match="Linear takes no cache"):
        cache_argument(nn.Linear(1, 1), None)


def planned_caches(model):
    plan = HeadPlan.uniform(model.config, HeadSpec(8, 2))
    while True:
        yield RedKnotCache(model.config, plan, page_size=16, max_cache_len=64)


@pytest.mark.parametrize("how", [{}, {"custom_generate": captured_decoding}], ids=["plain", "captured"])
def test_generate_takes_both_names_where_transformers_does(how, caplog):
    model = make_model("llama")
    caches = planned_caches(model)
    names = ["past_key_values", "cache"] if RENAMED else ["past_key_values"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True} | how
    with caplog.at_level(logging.WARNING, "transformers"):
        found = [model.generate(IDS, **{name: next(caches)}, **options) for name in names]
        cache = next(caches)
        found.append(model.generate(IDS, **cache_argument(model, cache), **options))
    assert not caplog.records
    assert found[-1][OF_GENERATE] is cache
    assert all(torch.equal(one.sequences, found[0].sequences) for one in found)
    assert all(one[OF_GENERATE].get_seq_length() == 42 for one in found)


def test_a_forward_pass_by_name_says_nothing(caplog):
    model = make_model("llama")
    cache = next(planned_caches(model))
    with caplog.at_level(logging.WARNING, "transformers"), torch.no_grad():
        out = model(IDS, **cache_argument(model, cache))
    assert not caplog.records
    assert out[OF_GENERATE] is cache
