"""What int8 and int4 cost in attention and in words: Gaussian data, the bundled model, and a real one."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.real import model as real_model
from evals.tiny.corpus import Corpus
from evals.tiny.lexicon import Lexicon
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.attention.stored import attend_stored
from redknot_hf.attention.watching import restricted, watching
from redknot_hf.profiling import python_texts

STORAGES = "int8", "int4"
TINY = Path(__file__).parents[1] / "tiny"


def gaussian(dim: int, tokens: int, device: torch.device, seed: int = 0) -> dict[str, float]:
    """Error of attention over independent normal keys and values, four queries a key head, by storage."""
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, tokens, dim, generator=draw).to(device) for heads in (16, 4, 4))
    options = {"scale": dim**-0.5, "softcap": None, "s_aux": None}
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    full, found = full.transpose(1, 2)[:, tokens // 2 :], {}
    for storage in STORAGES:
        stored = attend_stored(torch.nn.Module(), query, key, value, storage, options)[:, tokens // 2 :]
        found[storage] = relative(stored, full)
    return found


@torch.no_grad()
def of_model(model: Any, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """Errors of a model on a text `[1, tokens]`, by storage."""
    half, errors = ids.shape[1] // 2, {storage: [] for storage in STORAGES}

    def watcher(call: Any) -> Any:
        full = call.attend((HeadSpec(),) * call.heads)
        for storage in STORAGES if call.reach is None else ():
            stored = call.attend((HeadSpec(storage=storage),) * call.heads)
            errors[storage].append(relative(stored[:, half:], full[:, half:]))
        return full

    with watching(model, watcher):
        full = model(ids, use_cache=False).logits[0, half:].float().log_softmax(-1)
    found = {}
    for storage in STORAGES:
        with watching(model, restricted(HeadPlan.uniform(model.config, HeadSpec()).stored(storage))):
            stored = model(ids, use_cache=False).logits[0, half:].float().log_softmax(-1)
        found[storage] = {
            "attention": statistics.median(errors[storage]),
            "attention_most": max(errors[storage]),
            "kl": float((full.exp() * (full - stored)).sum(-1).mean()),
            "agree": float((full.argmax(-1) == stored.argmax(-1)).float().mean()),
        }
    return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the error, of that of what is wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def texts(length: int, real: Path, device: torch.device) -> Any:
    """Name, model and a text of up to so many tokens, of each model that there is."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "redknot"}
    bundled: Any = AutoModelForCausalLM.from_pretrained(TINY, **options)
    yield "bundled", bundled.to(device), torch.tensor([Corpus(Lexicon(), 0).collection(length, 5).context])
    if (real / "config.json").exists():
        model: Any = AutoModelForCausalLM.from_pretrained(real, **options)
        text = python_texts()[0][: 8 * length]
        ids = AutoTokenizer.from_pretrained(real)(text, return_tensors="pt")["input_ids"]
        yield real_model.NAME, model.to(device), ids[:, :length]
