"""Times of README's rows: what is measured, and that every line is there as soon as it is."""

import json
from types import SimpleNamespace

import pytest
import torch
from families import make_model
from pages import typed
from transformers import DynamicCache
from typer.testing import CliRunner

from evals.method import by_name
from evals.real import peers, speed
from evals.real.__main__ import app
from evals.real.peers import Press, pressing
from evals.real.speed import Speed, better, measure, plans, read
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import profile_heads


@pytest.fixture
def small(monkeypatch):
    """A model, and few tokens."""
    for name, value in (("_RUNS", 1), ("_WARM", 2), ("_NEW", 3), ("_TURNS", 3), ("_MORE", 24)):
        monkeypatch.setattr(speed, name, value)
    return make_model("llama")


def test_every_row_is_measured_beside_dense_and_written_at_once(small, tmp_path, monkeypatch):
    out, seen = tmp_path / "made" / "speed.jsonl", []
    collect = speed.TimedModel.collect
    monkeypatch.setattr(
        speed.TimedModel, "collect", lambda self: seen.append(out.exists() and len(read(out))) or collect(self)
    )
    some = {"narrow": HeadPlan.uniform(small.config, HeadSpec(8, 2))}
    measure(Speed(small, some, 140, (1, 2), False, 1e9, out))
    rows = read(out)
    assert [(row["method"], row["how"], row["batch"]) for row in rows] == [
        (method, how, batch)
        for batch in (1, 2)
        for method, how in (("dense", "eager"), ("narrow", "captured"), ("narrow", "eager"), ("dense", "compiled"))
    ]
    assert set(range(1, 8)) <= set(seen), "lines that were there while later rows were measured"
    for row in rows:
        beside = rows[0] if row["batch"] == 1 else rows[4]
        assert 0 < row["token_s"] < row["first_s"] * 10
        assert row["times_sooner"] == pytest.approx(beside["first_s"] / row["first_s"], abs=1e-4)
        assert row["times_tokens"] == pytest.approx(beside["token_s"] / row["token_s"], abs=1e-4)
        assert row["kv_bytes"] is None, "no allocator tells them here"
        assert {"device", "torch", "transformers"} <= row["hardware"].keys()
    last = json.loads(out.read_text().splitlines()[-1])
    assert tuple(last["better"]["narrow"]) == better(rows, "narrow")
    fastest = min(rows[1:3], key=lambda row: row["token_s"])
    assert better(rows, "narrow") == (fastest["times_sooner"], fastest["times_tokens"])


def test_a_row_that_fails_says_why_and_others_go_on(small, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise ImportError("quanto is not here\nand more")

    monkeypatch.setattr(speed, "QuantizedCache", fails)
    monkeypatch.setattr(speed, "_pressed", lambda bench, ids: {"first_s": 1.0, "token_s": 1.0, "kv_bytes": 3})
    rows = measure(Speed(small, {}, 40, (1,), True, 1e9, tmp_path / "speed.jsonl"))
    assert [row["method"] for row in rows] == ["dense", "transformers quanto 4 bits", "kvpress AdaKV SnapKV", "dense"]
    assert rows[1]["error"] == "ImportError: quanto is not here"
    assert better(rows, "transformers quanto 4 bits") is None
    assert "times_tokens" in rows[2]


def test_no_row_is_begun_when_the_time_is_over(small, tmp_path):
    assert measure(Speed(small, {}, 40, (1,), False, 0, tmp_path / "speed.jsonl")) == []


def test_plans_are_those_of_the_profiles_at_this_length(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fisher.json is not there: python -m evals.real profile fisher"):
        plans(small.config, 300, tmp_path)
    inputs = torch.randint(1, 97, (2, 300), generator=torch.Generator().manual_seed(0))
    profile = profile_heads(small, inputs, windows=(8,), storages=("int4",))
    for name in ("fisher", "mass"):
        profile.save(tmp_path / f"{name}.json")
    found = plans(small.config, 300, tmp_path)
    assert list(found) == [
        *("fisher 0.28", "fisher 0.2", "fisher 0.1", "mass 0.2"),
        *("int8 everywhere", "int4 everywhere", "streaming 0.2"),
    ]
    assert found["fisher 0.2"] == profile.plan(budget=0.2, length=300)
    assert found["streaming 0.2"][0][0] == HeadSpec(56, 4)


def test_the_command_writes_its_file_anew_and_fails_where_a_row_does(small, tmp_path, monkeypatch):
    out = tmp_path / "speed.jsonl"
    out.write_text("old\n")
    monkeypatch.setattr("evals.real.__main__._loaded", lambda model, device: (small, None))
    monkeypatch.setattr(speed, "plans", lambda config, length, folder: {"whole": HeadPlan.uniform(config, HeadSpec())})
    monkeypatch.setattr(speed, "_captured", _no_memory)
    words = typed("python -m evals.real speed", {"P": tmp_path, "S": out})[3:]
    result = CliRunner().invoke(app, [*words, "--length", "40", "--batch", "1"])
    assert "not measured, for the reason in their lines" in str(result.exception) + result.output
    assert [row["method"] for row in read(out)] == ["dense", "whole", "whole", "dense"]


def _no_memory(*arguments):
    raise torch.OutOfMemoryError("none left")


def test_a_press_chooses_behind_the_first_step_alone(monkeypatch):
    """kvpress' hook hears of each step where it stands; its attention is there only for the duration."""
    model, heard = make_model("llama"), []
    model.set_attn_implementation("sdpa")

    def hook(module, args, kwargs, output):
        heard.append((module.layer_idx, kwargs["hidden_states"].shape[1], kwargs["cache_position"][-1] + 1))
        assert kwargs["past_key_values"] is cache
        return output

    press = SimpleNamespace(post_init_from_model=lambda model: None, forward_hook=hook)
    monkeypatch.setattr(peers, "_press", lambda scorer, ratio: press)
    patched = SimpleNamespace(attention_patch=lambda function: function)
    monkeypatch.setitem(__import__("sys").modules, "kvpress.attention_patch", patched)
    monkeypatch.setitem(__import__("sys").modules, "kvpress", SimpleNamespace(attention_patch=patched))
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), pressing(model, Press("SnapKV", 0.2), cache):
        for new in (20, 1):
            model(torch.ones(1, new, dtype=torch.long), **by_name(cache))
    layers = model.config.num_hidden_layers
    assert heard == [*((i, 20, 20) for i in range(layers)), *((i, 1, 21) for i in range(layers))]
    assert not any(hasattr(module, "masked_key_indices") for module in model.modules())
