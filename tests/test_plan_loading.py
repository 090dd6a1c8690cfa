"""A plan that is loaded for a model says so where it was made for another."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from redknot_hf.plan.plan import HeadPlan
from redknot_hf.plan.spec import HeadSpec

LOCAL = HeadSpec(window=256, sink=4)


def config(layers=3, kv_heads=2, **more):
    return SimpleNamespace(num_hidden_layers=layers, num_key_value_heads=kv_heads, **more)


def test_load_checks_the_config(tmp_path):
    path = tmp_path / "plan.json"
    HeadPlan.uniform(config(3, 2), LOCAL).save(path)
    assert HeadPlan.load(path, config(3, 2)).num_heads == 6
    with pytest.raises(
        ValueError, match=r"plan\.json: the plan has 3 layers x 2 KV heads, the model .* has 3 layers x 4"
    ):
        HeadPlan.load(path, config(3, 4))


@pytest.mark.parametrize(
    ("made_for", "name", "revisions", "warning"),
    [
        ("org/model-a", "model-b", (None, None), "made for org/model-a, the model is model-b"),
        ("org/model-a", "/local/model-a", (None, None), None),
        ("org/model-a", "org/model-a", ("1f", "2e"), "revision 1f of org/model-a, the model is of revision 2e"),
        ("org/model-a", "org/model-a", ("1f", "1f"), None),
        ("org/model-a", "org/model-a", ("1f", None), None),
        ("org/model-a", "", (None, None), None),
        ("org/Model-A", "/local/model-a_bf16", (None, None), None),
        ("org/model-a-fp16", "/local/model-b-fp16", (None, None), "made for org/model-a-fp16"),
    ],
)
def test_plan_of_another_model_is_loaded_with_a_warning(tmp_path, made_for, name, revisions, warning):
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2)
    config.name_or_path, config._commit_hash = name, revisions[1]
    provenance = {"model": made_for, "revision": revisions[0]}
    HeadPlan([[HeadSpec()] * 2] * 2, provenance=provenance).save(tmp_path / "plan.json")
    with pytest.warns(UserWarning, match=warning) if warning else nullcontext():
        assert HeadPlan.load(tmp_path / "plan.json", config).num_global == 4
    HeadPlan.load(tmp_path / "plan.json")  # nothing to compare with


def test_the_same_weights_in_another_dtype_are_the_same_model_with_a_word(tmp_path, caplog):
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, dtype="float32")
    config.name_or_path = "/local/model-a"
    plan = HeadPlan([[HeadSpec()] * 2] * 2, provenance={"model": "model-a-bf16", "dtype": "bfloat16"})
    plan.save(tmp_path / "plan.json")
    with caplog.at_level("INFO", "redknot_hf"):
        assert HeadPlan.load(tmp_path / "plan.json", config) == plan
    assert "measured on model-a-bf16 in bfloat16, and the model is in float32: the same heads" in caplog.text
