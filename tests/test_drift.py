from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_model
from oracle import choices
from texts import profiling_prompts as prompts
from transformers import AutoModelForCausalLM

from evals.tiny.corpus import Corpus
from evals.tiny.lexicon import Lexicon
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.attention.watching import restricted, watching
from redknot_hf.profiling import Prompt, profile_heads
from redknot_hf.profiling.drift import drift, measure_drift

TINY = Path(__file__).parents[1] / "evals" / "tiny"
# Blocks that norm or scale their attention's output before they add it are among them.
BLOCKS = ("llama", "gemma2", "gemma3", "olmo2", "glm4", "granite", "phi3", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("family", BLOCKS)
def test_drift_is_the_change_of_the_stream(family):
    """Restricting one head changes the stream behind its layer's attention by exactly what was foretold."""
    model, prompt = make_model(family), prompts()[0]
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    foretold = drift(measure_drift(model, [prompt], choices(3, 9, sink=1), lambda: False), ["text"]).reshape(*shape, 2)
    whole = streams(model, prompt, HeadPlan.uniform(model.config, HeadSpec()))
    linear = family not in (
        "gemma2",
        "gemma3",
        "olmo2",
        "glm4",
    )  # else a norm stands between, and turns with the error
    for layer, head, column, window in ((0, 1, 0, 3), (shape[0] - 1, 2, 1, 9)):
        others = [(i, h) for i in range(shape[0]) for h in range(shape[1]) if (i, h) != (layer, head)]
        plan = HeadPlan.with_global(model.config, others, HeadSpec(window, 1))
        change = streams(model, prompt, plan)[layer] - whole[layer]
        found = (change[:-1].pow(2).sum(-1) / whole[layer][:-1].pow(2).sum(-1)).mean().sqrt()  # all tokens are scored
        assert float(found) == pytest.approx(foretold[layer, head, column], rel=1e-3 if linear else 0.5, abs=1e-6)


def streams(model, prompt, plan):
    """What the first module behind each attention is given that reads the stream."""
    name = {"gemma2": "pre_feedforward_layernorm", "gemma3": "pre_feedforward_layernorm", "olmo2": "mlp"}
    name = name.get(model.config.model_type.removesuffix("_text"), "post_attention_layernorm")
    found = []
    hooks = [
        getattr(layer, name).register_forward_pre_hook(lambda module, args: found.append(args[0][0].detach()))
        for layer in model.model.layers
    ]
    with torch.no_grad(), watching(model, restricted(plan)):
        model(prompt.ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def test_drift_falls_with_the_window_and_weighs_scored_queries_most():
    model, (prompt, _) = make_model("llama"), prompts()
    errors = drift(measure_drift(model, [prompt], choices(2, 8, 20, 38), lambda: False), ["text"])
    assert (errors[:, :-1].mean(0) > errors[:, 1:].mean(0)).all()
    early = Prompt(prompt.ids, torch.arange(40) <= 20)  # no query of theirs sees more than 20 tokens
    sums = measure_drift(model, [early], choices(2, 20), lambda: False)
    scored, reading = np.moveaxis(sums[0, :, :, :, 0] / sums[0, :, :, :, 1], -1, 0)
    assert (scored[:, 1] < 1e-12).all()
    assert (scored[:, 0] > 1e-6).all()
    assert (reading[:, 1] > 1e-6).all(), "later queries of the text see more"
    assert drift(sums, ["text"]) == pytest.approx(np.sqrt((scored + 0.1 * reading) / 1.1))


def test_kinds_count_alike_and_queries_within_a_kind():
    """A prompt's sums: one head, one choice, and of scored queries as of those all over error and number."""
    few, many, other = (np.array([[[(error, number)] * 2]]) for error, number in ((1.0, 1), (3.0, 9), (0.6, 3)))
    found = drift(np.stack([few, other, many]), ["copy", "text", "copy"])
    assert found == pytest.approx(np.sqrt([[(4 / 10 + 0.6 / 3) / 2]]))


def test_a_token_whose_embedding_is_zero_drifts_not():
    """The first token attends itself alone: where its embedding is zero, so is the stream, whatever heads see."""
    model, (prompt, _) = make_model("llama"), prompts()
    with torch.no_grad():
        model.get_input_embeddings().weight[prompt.ids[0]] = 0
    sums = measure_drift(model, [prompt], choices(2, 8), lambda: False)
    assert np.isfinite(sums).all()
    assert (drift(sums, ["text"]) > 0).all()


def test_a_seventh_of_a_texts_queries_stands_for_all(monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="redknot")
    monkeypatch.setattr("redknot_hf.profiling.drift._FEWEST", 1)
    ids, weights = Corpus(Lexicon(), 5).sample(1024, 14)
    inputs = [Prompt(torch.tensor(ids), torch.tensor(weights == 1))]
    specs = (*choices(128, sink=4), HeadSpec(storage="int4"))
    some = measure_drift(model, inputs, specs, lambda: False)
    assert (some[..., 1, 1] == 147).all()
    monkeypatch.setattr("redknot_hf.profiling.drift._EVERY", 1)
    monkeypatch.setattr("redknot_hf.profiling.drift._MOST", 4096)
    every = measure_drift(model, inputs, specs, lambda: False)
    assert (every[..., 1, 1] == 1023).all()
    off = np.abs(drift(some, ["text"]) / drift(every, ["text"]) - 1)
    assert np.median(off) < 0.01
    assert off.max() < 0.2


def test_true_heads_of_the_bundled_model():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="redknot")
    true = HeadPlan.load(TINY / "plan.json", model.config)
    samples = [Corpus(Lexicon(), seed).sample(1024, 14) for seed in range(4)]
    inputs = [Prompt(torch.tensor(ids), torch.tensor(weights == 1)) for ids, weights in samples]
    profile = profile_heads(model, inputs, global_ratio=10 / 32, windows=(128,))
    errors = np.stack(profile.table())
    right = np.array([[spec.is_global for spec in layer] for layer in true])
    ranked = errors[right][:, None] > errors[~right]
    assert ranked.mean() > 0.9  # the chance that a global head drifts more than a local one
    assert profile.plan().num_global == 10
    assert 0.5 < profile.overlap() <= 1
