"""A model on the bench: what a run needs besides tasks and methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.questions import Reader, end_tokens
from evals.real import model as real_model
from redknot_hf.text.chat import ChatTemplate

BUNDLED = Path(__file__).resolve().parent / "tiny"


@dataclass(frozen=True)
class Bench:
    """A model, how to load it again elsewhere, and what turns text into its tokens.

    Attributes:
        model: In evaluation mode, on its device.
        tokenizer: The model's.
        reader: Turns examples into tokens.
        name: Where it was loaded from: a folder or a Hub id.
    """

    model: Any
    tokenizer: Any
    reader: Reader
    name: str


def load_bench(name: str, dtype: str = "auto", device: str | None = None, chat: bool = False) -> Bench:
    """Load a model from a folder or the Hub.

    Args:
        name: The folder or id; "bundled" is the model in `evals/tiny`, "smollm2" the one that `evals.real` fetches.
        dtype: A torch dtype's name; "auto" is that of the weights on accelerators, and float32 on CPUs.
        device: By default a GPU if there is one.
        chat: Ask in the words of the model's chat template.

    Raises:
        FileNotFoundError: It is "smollm2", which has not been fetched, or "bundled" where no checkout is.
        ValueError: The model has no chat template, and is to be asked in it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = str(_known(name) or name)
    kind: Any = dtype
    if dtype == "auto" and device == "cpu":
        kind = torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(path)
    return make_bench(model.to(device).eval(), tokenizer, name, chat)


def _known(name: str) -> Path | None:
    if name == "smollm2":
        return real_model.folder()
    if name == "bundled" and not (BUNDLED / "config.json").exists():
        raise FileNotFoundError(
            "the bundled model is part of a checkout, and too large for the wheel: give --model a folder or a Hub id"
        )
    return BUNDLED if name == "bundled" else None


def make_bench(model: Any, tokenizer: Any, name: str, chat: bool = False) -> Bench:
    """Return a bench with a model that is loaded already."""
    template = ChatTemplate.of(tokenizer) if chat else None
    return Bench(model, tokenizer, Reader(tokenizer, end_tokens(model), template), name)
