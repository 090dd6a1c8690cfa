import json
import re
import time
from types import SimpleNamespace

import pytest

from redknot_hf.plan.plan import HeadPlan, HeadSpec

GLOBAL = HeadSpec()


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


PLAN = {
    "format": "redknot-plan",
    "version": 1,
    "layers": 2,
    "kv_heads": [2, 1],
    "default": {"window": 8, "sink": 1},
    "exceptions": [{"window": None, "heads": [[0, 1]]}],
}


def test_load(tmp_path):
    plan = HeadPlan.load(write(tmp_path / "plan.json", PLAN))
    assert plan.heads == ((HeadSpec(8, 1), GLOBAL), (HeadSpec(8, 1),))
    assert plan.provenance == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is not JSON"),
        ("\x00\x01", "is not JSON"),
        ("[1, 2]", r"holds \[1, 2\], not an object"),
        ({"format": "other"}, "is some other JSON, not a head plan; use a file that HeadPlan.save wrote"),
        ({"format": None, "kv_head_classification": []}, "is a RedKnot head-class file.*use HeadPlan.from_redknot"),
        ({"format": None, "mla_head_classification": []}, "use HeadPlan.from_redknot"),
        ({"format": None, "sink_size": 1, "recent_size": 2}, "use HeadPlan.from_duo_attention"),
        ({"version": 3}, "has version 3, known are 1 and 2; upgrade redknot-hf"),
        ({"layers": "2"}, "layers is '2'"),
        ({"layers": True}, "layers is True"),
        ({"layers": -1}, "layers is -1"),
        ({"layers": 0, "kv_heads": 1, "exceptions": []}, "the plan has no heads"),
        ({"kv_heads": [1]}, "kv_heads does not fit 2 layers"),
        ({"kv_heads": [1, -1]}, "kv_heads does not fit 2 layers"),
        ({"default": 8}, "default is 8"),
        ({"default": {"sink": 4}}, "default is {'sink': 4}; give window"),
        ({"default": {"window": 1.5}}, "default is {'window': 1.5}"),
        ({"default": {"window": 8, "sinks": 4}}, "default has the unknown key 'sinks'"),
        ({"default": {"window": None, "storage": "int2"}}, "storage is 'int2'"),
        ({"default": {"window": 8, "storage": "int8"}}, "a local head overwrites its pages"),
        ({"exceptions": {}}, "exceptions is {}"),
        ({"exceptions": [7]}, r"exceptions\[0\] is 7"),
        ({"exceptions": [{"window": 8}]}, r"exceptions\[0\]\.heads is missing"),
        ({"exceptions": [{"window": 8, "heads": [3]}]}, "names the head 3; write"),
        ({"exceptions": [{"window": 8, "heads": [[0, 0.5]]}]}, r"names the head \[0, 0.5\]; write"),
        ({"exceptions": [{"window": 8, "heads": [[1, 1]]}]}, r"names head \[1, 1\], outside the model"),
        ({"exceptions": [{"window": 8, "heads": [[-1, 0]]}]}, r"names head \[-1, 0\], outside the model"),
        ({"exceptions": [{"window": 8, "heads": [[0, 0], [0, 0]]}]}, r"names head \[0, 0\] a second time"),
        ({"provenance": "me"}, "provenance is 'me'"),
    ],
)
def test_load_refuses(change, message, tmp_path):
    path = write(tmp_path / "plan.json", change if isinstance(change, str) else PLAN | change)
    with pytest.raises(ValueError, match=rf"plan\.json: .*{message}"):
        HeadPlan.load(path)


@pytest.mark.parametrize("key", sorted(PLAN.keys() - {"format"}))
def test_load_names_the_missing_key(key, tmp_path):
    path = write(tmp_path / "plan.json", {k: v for k, v in PLAN.items() if k != key})
    with pytest.raises(ValueError, match="has version None" if key == "version" else f"{key} is missing"):
        HeadPlan.load(path)


REDKNOT = {
    "model": "tiny",
    "window": 4096,
    "num_layers": 3,
    "num_kv_heads": 3,
    "summary": {"global": 99},
    "kv_head_classification": [
        ["global", "retrieval", "dense"],
        ["local", "local_full", "limited"],
        ["streaming", "sink_dominant", "local"],
    ],
    "kv_head_max_distance": [[-1, 0, 64], [128, 0, -1], [256, None, 32]],
}


def test_from_redknot(tmp_path):
    plan = HeadPlan.from_redknot(write(tmp_path / "heads.json", REDKNOT))
    assert plan.heads == (
        (GLOBAL, GLOBAL, GLOBAL),
        (HeadSpec(128, 4), HeadSpec(512, 4), HeadSpec(512, 4)),
        (HeadSpec(256, 4), HeadSpec(512, 4), HeadSpec(32, 4)),
    )
    assert plan.provenance == {"source": "redknot", "file": "heads.json"}


@pytest.mark.parametrize(
    ("change", "last_layers"),
    [
        ({"kv_head_sink_size": None}, ((4, 4, 4), (4, 4, 4))),
        ({"kv_head_sink_size": [[9, 9, 9], [0, 1, None], [2, 3, 4]]}, ((0, 1, 4), (2, 3, 4))),
        ({"dense_prefix_layers": 2}, (None, (4, 4, 4))),
        ({"dense_prefix_layers": None}, ((4, 4, 4), (4, 4, 4))),
    ],
)
def test_from_redknot_sinks_and_dense_prefix(change, last_layers, tmp_path):
    plan = HeadPlan.from_redknot(write(tmp_path / "heads.json", REDKNOT | change))
    assert all(spec.is_global for spec in plan[0])
    for layer, sinks in zip(plan.heads[1:], last_layers, strict=True):
        assert all(s.is_global for s in layer) if sinks is None else tuple(s.sink for s in layer) == sinks


def test_from_redknot_without_distances(tmp_path):
    data = {key: value for key, value in REDKNOT.items() if key != "kv_head_max_distance"}
    plan = HeadPlan.from_redknot(write(tmp_path / "heads.json", data))
    assert {spec.window for spec in plan[1]} == {512}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("layer\thead", "is not JSON"),
        (PLAN, "is a head plan of redknot-hf.*use HeadPlan.load"),
        ({"num_layers": 4, "window": 8, "frac_global": 0.4}, "kv_head_classification is missing"),
        (REDKNOT | {"mla_head_classification": []}, "query heads of an MLA model"),
        (REDKNOT | {"num_layers": None}, "num_layers is None"),
        (REDKNOT | {"num_layers": 4}, "kv_head_classification has 3 layers, expected 4"),
        (REDKNOT | {"num_kv_heads": 2}, r"kv_head_classification\[0\] has 3 KV heads, expected 2"),
        (REDKNOT | {"kv_head_classification": None}, "kv_head_classification has None, expected 3"),
        (REDKNOT | {"kv_head_classification": [["global"] * 3, 1, 2]}, r"classification\[1\] has 1, expected 3"),
        (
            REDKNOT | {"kv_head_classification": [["globl"] * 3] * 3},
            r"classification\[0\]\[0\] is 'globl'; give one of",
        ),
        (REDKNOT | {"kv_head_max_distance": [[1, 2, "3"]] * 3}, r"distance\[0\]\[2\] is '3'; give a whole number"),
        (REDKNOT | {"kv_head_sink_size": [[4] * 3] * 2}, "kv_head_sink_size has 2 layers, expected 3"),
        (REDKNOT | {"kv_head_sink_size": [[-4] * 3] * 3}, "sink is -4"),
        (REDKNOT | {"dense_prefix_layers": "2"}, "dense_prefix_layers is '2'"),
    ],
)
def test_from_redknot_refuses(change, message, tmp_path):
    with pytest.raises(ValueError, match=rf"heads\.json: .*{message}"):
        HeadPlan.from_redknot(write(tmp_path / "heads.json", change))


def test_from_redknot_checks_the_config(tmp_path):
    path = write(tmp_path / "heads.json", REDKNOT)
    HeadPlan.from_redknot(path, SimpleNamespace(num_hidden_layers=3, num_key_value_heads=3))
    with pytest.raises(ValueError, match=r"heads\.json: the plan has 3 layers x 3 KV heads, the model"):
        HeadPlan.from_redknot(path, SimpleNamespace(num_hidden_layers=3, num_key_value_heads=8))


SCORES = "1.5e+00\t-2.0e-04\n5.0e-01\t5.0e-01\n\n5.0e-01\t9.0e-01\n"
SIZES = {"sink_size": 128, "recent_size": 256, "deploy_sink_size": None}


@pytest.fixture
def duo(tmp_path):
    write(tmp_path / "full_attention_heads.tsv", SCORES)
    write(tmp_path / "config.json", SIZES)
    return tmp_path


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"threshold": 0.5}, {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)}),
        ({"threshold": 0.50001}, {(0, 0), (2, 1)}),
        ({"threshold": 0.0}, {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)}),
        ({"threshold": 1.0}, {(0, 0)}),
        ({"threshold": 1.1}, set()),
        ({"global_ratio": 0.0}, set()),
        ({"global_ratio": 0.5}, {(0, 0), (2, 1), (1, 0)}),
        ({"global_ratio": 0.7}, {(0, 0), (2, 1), (1, 0), (1, 1)}),
        ({"global_ratio": 1.0}, {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)}),
    ],
    ids=str,
)
def test_from_duo_attention(choice, expected, duo):
    plan = HeadPlan.from_duo_attention(duo / "full_attention_heads.tsv", **choice)
    assert {(i, h) for i, layer in enumerate(plan) for h, spec in enumerate(layer) if spec.is_global} == expected
    assert {spec for layer in plan for spec in layer if not spec.is_global} <= {HeadSpec(window=256, sink=128)}
    assert plan.provenance == {"source": "duo-attention", "file": "full_attention_heads.tsv"} | choice
    assert HeadPlan.from_duo_attention(duo, **choice) == plan


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "global_ratio is None and threshold is None: give exactly one"),
        ({"global_ratio": 0.5, "threshold": 0.5}, "give exactly one"),
        ({"global_ratio": 25.0}, "global_ratio is 25.0: give a share from 0 to 1"),
        ({"global_ratio": float("nan")}, "global_ratio is nan"),
        ({"threshold": float("nan")}, "threshold is nan"),
    ],
    ids=str,
)
def test_from_duo_attention_refuses_the_choice(choice, message, duo):
    with pytest.raises(ValueError, match=message):
        HeadPlan.from_duo_attention(duo, **choice)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("", "holds no scores"),
        ("1.0\t0.5\n1.0\n", "line 2 has 1 scores, the first has 2"),
        ("1.0\tx\n", "line 1: could not convert string to float: 'x'"),
        ("1.0\tnan\n", "line 1: a score is not finite"),
        ("1.0,0.5\n", "tab-separated"),
    ],
)
def test_from_duo_attention_refuses_damaged_scores(scores, message, duo):
    write(duo / "full_attention_heads.tsv", scores)
    with pytest.raises(ValueError, match=rf"full_attention_heads\.tsv: .*{message}"):
        HeadPlan.from_duo_attention(duo, threshold=0.5)


def test_from_duo_attention_refuses_binary_scores(duo):
    (duo / "full_attention_heads.tsv").write_bytes(b"\x93NUMPY\xff")
    with pytest.raises(ValueError, match=r"full_attention_heads\.tsv: is not text"):
        HeadPlan.from_duo_attention(duo, threshold=0.5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sink_size": 4}, "recent_size is missing"),
        (SIZES | {"sink_size": None}, "sink_size is None"),
        ("{", "is not JSON"),
    ],
)
def test_from_duo_attention_refuses_damaged_sizes(sizes, message, duo):
    write(duo / "config.json", sizes)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        HeadPlan.from_duo_attention(duo, threshold=0.5)


def test_from_duo_attention_without_sizes(duo):
    (duo / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: it holds sink_size and recent_size"):
        HeadPlan.from_duo_attention(duo, threshold=0.5)


def test_from_duo_attention_checks_the_config(duo):
    with pytest.raises(ValueError, match=r"the plan has 3 layers x 2 KV heads, the model .* has 3 layers x 8"):
        HeadPlan.from_duo_attention(
            duo, threshold=0.5, config=SimpleNamespace(num_hidden_layers=3, num_key_value_heads=8)
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": 10**7}, {"layers": 2**31}, {"layers": 2**63}, {"kv_heads": 10**9}, {"layers": 10**7, "kv_heads": 0},
        {"kv_heads": [10**9, 1]}, {"version": True}, {"version": 1.0}, {"default": {"window": 8, "sink": 2**31}},
        {"default": {"window": 1.5}}, {"default": {"window": [8]}}, {"exceptions": {"heads": 3}}, {"exceptions": [3]},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_no_model_has_and_wrong_types_are_told_at_once(tmp_path, fields):
    data = {"format": "redknot-plan", "version": 1, "layers": 2, "kv_heads": 1, "default": {"window": None}}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data | {"exceptions": []}))
    assert HeadPlan.load(path).num_global == 2
    path.write_text(json.dumps(data | {"exceptions": []} | fields))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        HeadPlan.load(path)
    assert time.perf_counter() - start < 1
