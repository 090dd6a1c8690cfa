"""Transformers' own caches that keep every token: growing, reserved, quantised."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from transformers import Cache, QuantizedCache, StaticCache

from evals.method import Context, Method, dense, read, shared

__all__ = ["dense", "quantised", "static"]

_BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


@dataclass(frozen=True)
class Static(Method):
    """Slots for all tokens, reserved at the start."""

    def prepare(self, model: Any, context: Context) -> Cache:
        slots = context.ids.shape[1] + context.room
        return read(model, StaticCache(config=model.config, max_cache_len=slots), context)


@dataclass(frozen=True)
class Quantised(Method):
    """Keys and values in a few bits each, as KIVI (arXiv 2402.02750) has them."""

    backend: str = "quanto"
    bits: int = 4

    def prepare(self, model: Any, context: Context) -> Cache:
        if not _installed(_BACKENDS[self.backend]):  # told in its row: what else is measured goes on
            raise ImportError(f"the quantised cache needs {self.backend}: pip install 'redknot-hf[quantised]'")
        return read(model, QuantizedCache(backend=self.backend, config=model.config, nbits=self.bits), context)

    def fork(self, cache: Cache) -> Cache:
        return shared(cache)  # what the backends store cannot always be copied


def static() -> Method:
    """Return `StaticCache`."""
    return Static("static", batched=False)


def quantised(backend: str = "quanto", bits: int = 4) -> Method:
    """Return `QuantizedCache`.

    Args:
        backend: "quanto" or "hqq".
        bits: Of each element.

    Raises:
        ValueError: The backend is unknown. One that is not installed is told when it is to hold a context.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(_BACKENDS)}")
    identity = {"backend": backend, "bits": bits}
    name = f"quantised, {bits} bits" if backend == "quanto" else f"quantised by {backend}, {bits} bits"
    return Quantised(name, identity=identity, batched=False, backend=backend, bits=bits)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
