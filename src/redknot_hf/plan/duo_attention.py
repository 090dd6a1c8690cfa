"""Where DuoAttention's scores are: a path, a URL that fsspec knows, or the name of a model that its authors measured.

Source: github.com/mit-han-lab/duo-attention, attn_patterns (arXiv 2410.10819).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from .formats import AnyPath

PATTERNS = "https://raw.githubusercontent.com/mit-han-lab/duo-attention/main/attn_patterns"
_SHORT, _LONG = (f"lr=0.02-reg=0.05-ctx=1000_{tokens}-multi_passkey10" for tokens in (32000, 128000))
# Models with published scores, and what their authors' folders are called.
MODELS = {
    "Llama-2-7B-32K-Instruct": f"Llama-2-7B-32K-Instruct/{_SHORT}",
    "Llama-3-8B-Instruct-Gradient-1048k": f"Llama-3-8B-Instruct-Gradient-1048k/{_SHORT}",
    "Llama-3-8B-Instruct-Gradient-4194k": f"Llama-3-8B-Instruct-Gradient-4194k/{_SHORT}",
    "Llama-3.1-8B-Instruct": f"Meta-Llama-3.1-8B-Instruct/{_LONG}",
    "Mistral-7B-Instruct-v0.2": f"Mistral-7B-Instruct-v0.2/{_SHORT}",
    "Mistral-7B-Instruct-v0.3": f"Mistral-7B-Instruct-v0.3/{_SHORT}",
}
_FILES = ("full_attention_heads.tsv", "config.json")


def published(name: AnyPath) -> str | None:
    """The URL of the scores of a model, by its name or its id on the Hub; None if its authors published none."""
    last = str(name).rsplit("/", 1)[-1].lower().removeprefix("meta-")
    return next((f"{PATTERNS}/{folder}" for model, folder in MODELS.items() if model.lower() == last), None)


@contextmanager
def at_hand(source: AnyPath) -> Iterator[Path]:
    """The scores as files of this machine: a path as it is; of a URL or a model's name a copy, for the while.

    Raises:
        FileNotFoundError: Nothing is there; for what is neither path nor URL the message names the models.
        ImportError: The URL needs a package that is not installed.
    """
    name = str(source)
    if Path(source).exists():
        yield Path(source)
        return
    url = name if "://" in name else published(source)
    if url is None:
        raise FileNotFoundError(f"{name}: no such file, and no model with published scores: {', '.join(MODELS)}")
    folder = url.removesuffix(_FILES[0]).rstrip("/")
    with tempfile.TemporaryDirectory() as copied:
        for file in _FILES:
            try:
                text = fsspec.open(f"{folder}/{file}", "r", encoding="utf-8")
                with text as remote:
                    Path(copied, file).write_text(remote.read(), encoding="utf-8")  # pyright: ignore
            except FileNotFoundError as e:
                raise FileNotFoundError(f"{folder}/{file} is missing, or cannot be reached") from e
        try:
            yield Path(copied)
        except ValueError as e:
            raise ValueError(str(e).replace(copied, folder)) from e
