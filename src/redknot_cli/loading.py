"""What commands load: the model and its tokenizer, and the prompts that it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import redknot_hf  # noqa: F401 - registers "redknot"
from redknot_hf.parallel import over_ranks
from redknot_hf.profiling import Prompt, calibration_kinds, calibration_prompts
from redknot_hf.profiling.texts import read_texts


@dataclass(frozen=True)
class Source:
    """Where a model is, and how it is wanted; checked when made, before anything is loaded.

    Attributes:
        name: Id on the Hub, or a folder.
        revision: Of the repository.
        gguf: Name of a GGUF file in it.
        dtype, device: As the command line has them; the device `"auto"` spreads layers over all GPUs.

    Raises:
        ValueError: There is no such dtype or device, or the folder is none of a model.
        ImportError: Reading GGUF, or spreading layers, needs a package that is not installed.
    """

    name: str
    revision: str | None = None
    gguf: str | None = None
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self._dtype, str | torch.dtype):
            raise ValueError(f"--dtype {self.dtype}: give auto, float32, bfloat16 or float16")
        try:
            torch.empty(0, device="cpu" if self.device == "auto" else self._device)
        except (RuntimeError, AssertionError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"--device {self._device}: {reason}; give cpu, or leave it out") from e
        if self.device == "auto" and not find_spec("accelerate"):
            raise ImportError("--device auto needs the package accelerate: pip install 'redknot-hf[offload]'")
        if self.gguf and not find_spec("gguf"):
            raise ImportError("reading GGUF needs the package gguf: pip install 'redknot-hf[gguf]'")
        if reason := _amiss(self.name, self.gguf):
            raise ValueError(reason)

    @property
    def _dtype(self) -> Any:
        return self.dtype if self.dtype == "auto" else getattr(torch, self.dtype, None)

    @property
    def _device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def _where(self) -> dict[str, str]:
        found = {"revision": self.revision, "gguf_file": self.gguf}
        return {word: value for word, value in found.items() if value is not None}

    def tokenizer(self) -> Any:
        """Loads the tokenizer."""
        return AutoTokenizer.from_pretrained(self.name, **self._where)

    def model(self, ranks: int = 1) -> Any:
        """Loads the model, with attention "redknot"; of several ranks each loads its heads, on its own device."""
        more: dict[str, Any] = {**self._where, **(over_ranks(ranks) if ranks > 1 else {})}
        spread = self.device == "auto"
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.name, dtype=self._dtype, attn_implementation="redknot", device_map="auto" if spread else None, **more
        )
        return loaded if ranks > 1 or spread else loaded.to(self._device)


def _amiss(name: str, gguf: str | None) -> str | None:
    """Why a path holds no model to load, in words; None if it may, or if it can only be an id on the Hub."""
    path = Path(name)
    if path.is_file():
        file = f", and --gguf-file {path.name}" if path.suffix == ".gguf" else ""
        return f"{path} is a file: give its folder, {path.parent}{file}"
    if not path.is_dir():
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        return f"there is no folder {path}; a model on the Hub is ORG/NAME" if looks_local else None
    files = sorted(file.name for file in path.glob("*.gguf"))
    if gguf and not (path / gguf).is_file():
        return f"{path} has no file {gguf}" + (f"; in this format it has {', '.join(files)}" if files else "")
    if not gguf and not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
        hint = f"give --gguf-file {files[0]}" if files else "save_pretrained of a model writes one"
        return f"{path} has no config.json: {hint}"
    return None


@dataclass(frozen=True)
class Asked:
    """What prompts are made of."""

    tokenizer: Any
    named: Sequence[str] | None
    texts: Sequence[str]

    @classmethod
    def of(cls, tokenizer: Any, kinds: str | None, texts: str | None) -> Asked:
        """As the command line has them."""
        return cls(tokenizer, kinds.split(",") if kinds else None, read_texts(texts) if texts else ())

    @cached_property
    def kinds(self) -> Sequence[str]:
        """Of which they are."""
        return self.named or calibration_kinds(self.texts, self.tokenizer)

    def prompts(self, length: int, count: int, seed: int) -> list[Prompt]:
        """So many of them."""
        return calibration_prompts(
            self.tokenizer, length=length, count=count, kinds=self.kinds, texts=self.texts, seed=seed
        )
