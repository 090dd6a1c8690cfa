import json
import pickle
import re
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Gemma4TextConfig, GPT2Config, LlamaConfig, LlavaConfig, MiMoV2FlashConfig

from redknot_hf.plan.plan import HeadPlan
from redknot_hf.plan.spec import HeadSpec
from redknot_hf.plan.storage import cold_pages

LOCAL = HeadSpec(window=256, sink=4)


def config(layers=3, kv_heads=2, **more):
    return SimpleNamespace(num_hidden_layers=layers, num_key_value_heads=kv_heads, **more)


def test_plan_is_frozen_nested_data():
    plan = HeadPlan([[HeadSpec(), LOCAL], [LOCAL, LOCAL]], provenance={"method": "hand"})
    assert plan.heads == ((HeadSpec(), LOCAL), (LOCAL, LOCAL))
    assert plan[0][0].is_global
    assert not plan[-1][1].is_global
    assert (len(plan), plan.num_heads, plan.num_global) == (2, 4, 1)
    assert list(plan) == [plan[0], plan[1]]
    assert repr(plan) == "HeadPlan(2 layers x 2 KV heads, 1 global)"
    with pytest.raises(FrozenInstanceError):
        plan.heads = ()


def test_provenance_is_no_part_of_equality():
    one, other = HeadPlan(((LOCAL,),), provenance={"a": 1}), HeadPlan(((LOCAL,),))
    assert one == other
    assert len({one, other}) == 1
    assert other != HeadPlan(((HeadSpec(),),))
    copy = pickle.loads(pickle.dumps(one))
    assert (copy, copy.provenance) == (one, {"a": 1})


@pytest.mark.parametrize("heads", [(), ((),)])
def test_plan_refuses_to_be_empty(heads):
    with pytest.raises(ValueError, match="no heads"):
        HeadPlan(heads)


@pytest.mark.parametrize(
    ("model_config", "shape"),
    [
        (config(3, 2), (2, 2, 2)),
        (config(2, None, num_attention_heads=5), (5, 5)),
        (SimpleNamespace(num_hidden_layers=1, num_attention_heads=4), (4,)),
        (config(3, [2, 0, 4]), (2, 0, 4)),
        (LlamaConfig(num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, hidden_size=12), (2, 2, 2)),
        (GPT2Config(n_layer=2, n_head=3, n_embd=6), (3, 3)),
        (LlavaConfig(text_config=LlamaConfig(num_hidden_layers=2, num_key_value_heads=4)), (4, 4)),
    ],
    ids=["kv", "none", "mha", "by layer", "llama", "gpt2", "llava"],
)
def test_shape_comes_from_the_text_config(model_config, shape):
    plan = HeadPlan.uniform(model_config, LOCAL)
    assert tuple(map(len, plan)) == shape
    assert plan.num_global == 0
    plan.check(model_config)


GEMMA4 = Gemma4TextConfig(
    num_hidden_layers=4, num_key_value_heads=4, num_global_key_value_heads=2, attention_k_eq_v=True, head_dim=8,
    global_head_dim=16, layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
MIMO = MiMoV2FlashConfig(
    num_hidden_layers=3, num_key_value_heads=2, head_dim=6, v_head_dim=4,
    layer_types=["full_attention", "sliding_attention", "sliding_attention"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("model_config", "shape", "token_elements"),
    [(GEMMA4, (4, 2, 4, 2), 2 * (4 * 16 + 2 * 32)), (MIMO, (2, 4, 4), 10 * 10)],
    ids=["gemma4", "mimo"],
)
def test_heads_and_dims_that_differ_by_layer(tmp_path, model_config, shape, token_elements):
    plan = HeadPlan.with_global(model_config, [(0, 1), (1, shape[1] - 1)], LOCAL)
    assert tuple(map(len, plan)) == shape
    path = tmp_path / "plan.json"
    plan.save(path)
    assert HeadPlan.load(path, model_config) == plan
    assert str(list(shape)) in str(plan)
    full = HeadPlan.uniform(model_config, HeadSpec())
    assert full.nbytes(10, model_config, "float16") == 20 * token_elements
    with pytest.raises(ValueError, match=rf"the model .* has .*{re.escape(str(list(shape)))} KV heads"):
        HeadPlan.uniform(config(len(shape), 3), LOCAL).check(model_config)
    with pytest.raises(ValueError, match=r"lies outside the model"):
        HeadPlan.with_global(model_config, [(1, shape[1])], LOCAL)


def test_config_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"SimpleNamespace has num_hidden_layers=None and None KV heads"):
        HeadPlan.uniform(SimpleNamespace(), LOCAL)


def test_with_global():
    plan = HeadPlan.with_global(config(), ((layer, np.int64(1)) for layer in (0, 2)), local=LOCAL)
    assert plan.heads == ((LOCAL, HeadSpec()), (LOCAL, LOCAL), (LOCAL, HeadSpec()))


@pytest.mark.parametrize("pair", [(3, 0), (0, 2), (-1, 0), (0, -1)])
def test_with_global_refuses_pairs_outside_the_model(pair):
    with pytest.raises(ValueError, match=rf"\({pair[0]}, {pair[1]}\) lies outside .* 3 layers x 2 KV heads"):
        HeadPlan.with_global(config(), [(0, 0), pair], local=LOCAL)


@pytest.mark.parametrize(
    ("model_config", "model"),
    [
        (config(4, 2, model_type="llama", architectures=["LlamaForCausalLM"]), "LlamaForCausalLM / llama"),
        (config(4, 2, model_type="llama", architectures=None), "llama"),
        (config(4, 2), "SimpleNamespace"),
    ],
)
def test_check_names_both_shapes(model_config, model):
    plan = HeadPlan.uniform(config(3, 2), LOCAL)
    message = rf"the plan has 3 layers x 2 KV heads, the model \({model}\) has 4 layers x 2 KV heads: load"
    with pytest.raises(ValueError, match=message):
        plan.check(model_config)


STORED = HeadPlan(((HeadSpec(), LOCAL, HeadSpec(None, 0, "int8")), (HeadSpec(storage="int4"), LOCAL, HeadSpec())))
PLANS = {
    "stored": STORED,
    "all stored": HeadPlan.uniform(config(2, 2), HeadSpec(storage="int8")),
    "all global": HeadPlan.uniform(config(2, 3), HeadSpec()),
    "all local": HeadPlan.uniform(config(1, 1), LOCAL),
    "mixed": HeadPlan(((HeadSpec(), LOCAL, LOCAL), (HeadSpec(64), LOCAL, HeadSpec(64, 1)))),
    "by layer": HeadPlan(((LOCAL,), (), (HeadSpec(), LOCAL))),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_save_and_load(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("an older file")
    provenance = {"model": "tiny", "drift": [0.5, None]}
    HeadPlan(plan.heads, provenance=provenance).save(path)
    loaded = HeadPlan.load(str(path))
    assert loaded == plan
    assert loaded.provenance == provenance
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays


def test_file_is_small_and_readable(tmp_path):
    plan = HeadPlan.with_global(config(32, 8), [(0, 0), (0, 3), (12, 6), (19, 2), (25, 5)], local=LOCAL)
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert len(text) < 600
    assert text.splitlines() == [
        "{",
        '  "format": "redknot-plan",',
        '  "version": 1,',
        '  "layers": 32,',
        '  "kv_heads": 8,',
        '  "default": {"window": 256, "sink": 4},',
        '  "exceptions": [',
        '    {"window": null, "heads": [[0, 0], [0, 3], [12, 6], [19, 2], [25, 5]]}',
        "  ],",
        '  "provenance": {}',
        "}",
    ]


def test_a_file_with_storages_is_of_the_second_version(tmp_path):
    STORED.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text().splitlines()[2:] == [
        '  "version": 2,',
        '  "layers": 2,',
        '  "kv_heads": 3,',
        '  "default": {"window": null},',
        '  "exceptions": [',
        '    {"window": 256, "sink": 4, "heads": [[0, 1], [1, 1]]},',
        '    {"window": null, "storage": "int8", "heads": [[0, 2]]},',
        '    {"window": null, "storage": "int4", "heads": [[1, 0]]}',
        "  ],",
        '  "provenance": {}',
        "}",
    ]


def test_stored():
    plan = HeadPlan(((HeadSpec(), LOCAL), (HeadSpec(), HeadSpec())), provenance={"method": "hand"})
    coarse = plan.stored("int8")
    assert [[spec.storage for spec in layer] for layer in coarse] == [["int8", "model"], ["int8", "int8"]]
    assert coarse.provenance == plan.provenance
    mixed = coarse.stored("int4", heads=((1, np.int64(head)) for head in (0,)))
    assert [spec.storage for spec in mixed[1]] == ["int4", "int8"]
    assert mixed.stored("model") == plan
    with pytest.raises(ValueError, match="window is 256: a local head overwrites its pages"):
        plan.stored("int8", heads=[(0, 1)])
    with pytest.raises(ValueError, match=r"head \(2, 0\) lies outside the model, which has 2 layers x 2 KV heads"):
        plan.stored("int8", heads=[(2, 0)])
    with pytest.raises(ValueError, match="storage is 'int3'"):
        plan.stored("int3")


@pytest.mark.parametrize(("storage", "bits", "most"), [("int8", 8, 0.53), ("int4", 4, 0.28)])
def test_nbytes_of_a_stored_head(storage, bits, most):
    plan = HeadPlan.uniform(config(1, 1), HeadSpec(storage=storage))
    dense = HeadPlan.uniform(config(1, 1), HeadSpec())
    page = (
        64 * 256 * bits // 8 + (128 + 64) * 2 * 2 + 16
    )  # scale and zero for each channel of K and each token of V, and a tail
    # Of 1000 tokens 128 are hot; 872 are 13 whole pages, the first of which stays.
    for length, cold in ((0, 0), (128, 0), (255, 0), (256, 1), (1000, 12), (1024, 13), (2**17, 2**11 - 3)):
        assert plan.nbytes(length, 128, "bfloat16") == (length - 64 * cold) * 512 + cold * page
    assert plan.nbytes(2**17, 128, 2) <= most * dense.nbytes(2**17, 128, 2)
    assert plan.nbytes(100, (64, 32), 2, page_size=16, hot=0) == 20 * 192 + 5 * (16 * 96 * bits // 8 + 80 * 4 + 16)


@pytest.mark.parametrize("provenance", [{"model": object()}, {"drift": float("nan")}], ids=["object", "nan"])
def test_save_refuses_provenance_that_json_cannot_hold(provenance, tmp_path):
    with pytest.raises(ValueError, match=r"plan\.json: the provenance does not fit JSON"):
        HeadPlan(((LOCAL,),), provenance=provenance).save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spec", "message"), [({"window": 0}, "window is 0"), ({"window": 8, "sink": -1}, "sink is -1")]
)
def test_load_names_the_file_of_a_wrong_spec(spec, message, tmp_path):
    path = tmp_path / "plan.json"
    HeadPlan.uniform(config(), LOCAL).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"default": spec}))
    with pytest.raises(ValueError, match=rf"plan\.json: {message}"):
        HeadPlan.load(path)


# Two global heads keep 100 tokens each, four local ones 4 + 8: 248 tokens.
SMALL = HeadPlan.with_global(config(3, 2), [(0, 0), (2, 1)], local=HeadSpec(8, 4))


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype", "nbytes"),
    [
        (100, 64, torch.bfloat16, 248 * 2 * 64 * 2),
        (100, 64, "bfloat16", 248 * 2 * 64 * 2),
        (100, 64, "torch.float16", 248 * 2 * 64 * 2),
        (100, 64, "float32", 248 * 2 * 64 * 4),
        (100, 64, np.dtype("float64"), 248 * 2 * 64 * 8),
        (100, 64, 1, 248 * 2 * 64),
        (100, (192, 128), torch.float8_e4m3fn, 248 * 320),
        (5, 64, 2, 6 * 5 * 2 * 64 * 2),
        (0, 64, 2, 0),
    ],
)
def test_nbytes(length, head_dim, dtype, nbytes):
    assert SMALL.nbytes(length, head_dim, dtype) == nbytes


@pytest.mark.parametrize(("page_size", "hot"), [(64, 128), (16, 0), (16, 5)])
def test_cold_pages_are_full_behind_the_hot_tail_and_not_the_first(page_size, hot):
    for length in range(400):
        full = [page for page in range(1, 100) if (page + 1) * page_size <= length - hot]
        assert cold_pages(length, page_size, hot) == len(full)


@pytest.mark.parametrize("dtype", ["bf16", 0, True, None])
def test_nbytes_refuses_unknown_dtypes(dtype):
    with pytest.raises(ValueError, match=f"dtype is {dtype!r}: give a torch or numpy dtype"):
        SMALL.nbytes(1, 64, dtype)
