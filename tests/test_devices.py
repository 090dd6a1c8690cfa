"""Models whose weights stay elsewhere: texts are stored and reused, and heads are profiled."""

import accelerate
import numpy as np
import pytest
import torch
from families import make_model
from oracle import random_plan

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, SegmentStore, assemble, prompt
from redknot_hf.attention.devices import devices_of_layers, input_device, weight_of
from redknot_hf.profiling import profile_heads


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model, folder):
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched(model, folder):
    """Embedding and head on the CPU, the first layer's weights on disk, the second's kept on the host by a hook."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(1, model.config.num_hidden_layers)}
    places["model.layers.0"] = "disk"
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


OFFLOADS = [to_cpu, to_disk, dispatched]


def texts(*lengths):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (n,), generator=draw).tolist() for n in lengths]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_store_of_a_model_whose_weights_stay_elsewhere(offload, tmp_path):
    found = []
    for place in (None, offload):
        model = make_model("llama", tie_word_embeddings=False)
        model = model if place is None else place(model, tmp_path)
        store = SegmentStore(model, random_plan(model.config), identity="llama of a test")
        parts = store.add_all(texts(20, 30))
        found.append(model.generate(**prompt(assemble(model, parts[::-1]), texts(5)[0]), max_new_tokens=5))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert {input_device(model), *devices_of_layers(model, 2)} == {torch.device("cpu")}
    assert torch.equal(*found)
    with weight_of(model.model.layers[0].self_attn.o_proj) as weight:
        assert not weight.is_meta


@pytest.mark.parametrize("method", ["drift", "mass", "loss", "gates"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_heads_of_a_model_whose_weights_stay_elsewhere(method, offload, tmp_path):
    found, options = [], {"windows": (8,), "steps": 6} if method == "gates" else {"windows": (8, 16)}
    for place in (None, offload):
        model = make_model("llama", tie_word_embeddings=False, num_hidden_layers=2)
        model = model if place is None else place(model, tmp_path)
        found.append(profile_heads(model, texts(60, 60, 60), sink=1, method=method, budget=0.5, **options))
    np.testing.assert_allclose(found[0].errors, found[1].errors, rtol=1e-4)


def test_a_second_and_a_third_question_find_the_cache_as_it_was():
    model = make_model("llama", num_hidden_layers=2)
    store = SegmentStore(model, random_plan(model.config))
    parts = store.add_all(texts(20, 30))
    cache = assemble(model, parts)
    for question in (texts(5)[0], torch.tensor(texts(7)[0]), np.array(texts(9)[0])):
        fresh = model.generate(**prompt(assemble(model, parts), question), max_new_tokens=5)
        assert torch.equal(model.generate(**prompt(cache, question), max_new_tokens=5), fresh)
        assert torch.equal(model.generate(**prompt(parts, question, cache=cache), max_new_tokens=5), fresh)
    with pytest.raises(ValueError, match="give the segments in the same order, or the cache in their place"):
        prompt(parts[::-1], [3], cache=cache)
    model.generate(**prompt(parts, [3, 4]), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"holds 53 tokens and its context has 50.*cache\.fork\(\)"):
        prompt(cache, [3])


def test_a_cache_takes_the_model_and_the_file_of_a_plan(tmp_path):
    model = make_model("llama", num_hidden_layers=2)
    plan = HeadPlan.uniform(model, HeadSpec(8, 2))
    plan.save(tmp_path / "plan.json")
    for cache in (RedKnotCache(model, plan), RedKnotCache(model.config, str(tmp_path / "plan.json"))):
        assert cache.plan == plan
