"""Other libraries' ways to keep less, asked the frontier's questions: presses of kvpress, transformers' few bits.

They read the context as the dense model does and keep less of it afterwards, so running text in it says nothing of
them. Every layer's own code chooses or quantises what the layer has of the context; the questions and answers behind
it, which it has not seen, are attended in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evals.real.items import Item
from redknot_hf import HeadSpec
from redknot_hf.attention.dense import dense_attention
from redknot_hf.attention.watching import Attended, Call, attention_layers, watching

SHARES = (0.1, 0.15, 0.2, 0.28, 0.53)  # of the context, for presses
_GROUP = 64  # elements that share a scale and a zero, of 16 bits each
Context = Float[Tensor, "1 heads context dim"]


@dataclass(frozen=True)
class Press:
    """AdaKV over a scorer of kvpress, at a share of the context's keys and values.

    Attributes:
        scorer: "SnapKV" or "ExpectedAttention".
    """

    scorer: str
    budget: float
    tells_text = False

    @property
    def method(self) -> str:
        """What tables call it."""
        return f"kvpress AdaKV {self.scorer}"

    @property
    def kept(self) -> float:
        """Share of the bytes."""
        return self.budget

    @contextmanager
    def running(self, model: Any, item: Item) -> Iterator[None]:
        """The model answers an item under it, for the duration.

        Raises:
            ImportError: kvpress is not installed.
        """
        press, inputs = _press(self.scorer, 1 - self.budget), {}
        press.post_init_from_model(model)

        def hear(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            inputs.update(kwargs)

        with ExitStack() as stack:
            for _, module in attention_layers(model):
                module.rotary_emb = model.model.rotary_emb
                stack.callback(delattr, module, "rotary_emb")
                stack.callback(vars(module).pop, "masked_key_indices", None)
                stack.callback(module.register_forward_pre_hook(hear, with_kwargs=True).remove)
            stack.enter_context(watching(model, partial(_pressed, press, inputs, item.context)))
            yield


@dataclass(frozen=True)
class Quantised:
    """Transformers' `QuantizedCache`, which quantises what a first step has read, and no token of it is spared."""

    backend: str
    bits: int
    tells_text = False

    @property
    def method(self) -> str:
        """What tables call it."""
        return f"transformers {self.backend} {self.bits} bits"

    @property
    def kept(self) -> float:
        """Share of the bytes: codes, and a scale and a zero for every group."""
        return (self.bits + 2 * 16 / _GROUP) / 16

    @property
    def budget(self) -> float:
        """Share of the bytes that is asked for."""
        return round(self.kept, 2)

    @contextmanager
    def running(self, model: Any, item: Item) -> Iterator[None]:
        """The model answers an item under it, for the duration.

        Raises:
            ImportError: The backend is not installed.
        """
        cache = QuantizedCache(self.backend, model.config, nbits=self.bits, q_group_size=_GROUP)
        with watching(model, partial(_quantised, cache, item.context)):
            yield


Peer = Press | Quantised


def peers() -> list[Peer]:
    """All of them, at all shares.

    Raises:
        ImportError: A library is not installed, which would be found out in the middle of a run.
    """
    wanted = {"kvpress": "kvpress", "optimum": "optimum-quanto", "hqq": "hqq"}
    if missing := [package for name, package in wanted.items() if find_spec(name) is None]:
        raise ImportError(f"--peers needs {', '.join(missing)}: evals/real/measure.sh says what to install")
    presses = [Press(scorer, share) for share in SHARES for scorer in ("SnapKV", "ExpectedAttention")]
    return [*presses, *(Quantised(backend, bits) for backend in ("quanto", "hqq") for bits in (2, 4))]


@contextmanager
def pressing(model: Any, press: Press, cache: DynamicCache) -> Iterator[None]:
    """kvpress at work in the model itself, for the duration: its hooks choose once a first step has been read.

    What they do not choose stays in the cache, and kvpress' own attention hides it from later steps. The hooks are
    told where a step stands and which cache it fills, as transformers did when they were written.

    Raises:
        ImportError: kvpress is not installed.
    """
    made = _press(press.scorer, 1 - press.budget)
    from kvpress.attention_patch import attention_patch  # pyright: ignore[reportMissingImports]

    name = model.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS[name]
    made.post_init_from_model(model)

    def compress(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        length, new = cache.get_seq_length(module.layer_idx), kwargs["hidden_states"].shape[1]
        kwargs = {**kwargs, "past_key_values": cache, "cache_position": range(length - new, length)}
        return made.forward_hook(module, args, kwargs, output)

    with ExitStack() as stack:
        ALL_ATTENTION_FUNCTIONS[name] = attention_patch(attention)
        stack.callback(ALL_ATTENTION_FUNCTIONS.__setitem__, name, attention)
        for _, module in attention_layers(model):
            module.rotary_emb = model.model.rotary_emb
            stack.callback(delattr, module, "rotary_emb")
            stack.callback(vars(module).pop, "masked_key_indices", None)
            stack.callback(module.register_forward_hook(compress, with_kwargs=True).remove)
        yield


def _press(scorer: str, ratio: float) -> Any:
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    import kvpress  # pyright: ignore[reportMissingImports]

    for name, function in before.items():  # it wraps all there are
        ALL_ATTENTION_FUNCTIONS[name] = function
    options = {"epsilon": 1e-2} if scorer == "ExpectedAttention" else {}
    return kvpress.AdaKVPress(getattr(kvpress, f"{scorer}Press")(compression_ratio=ratio, **options))


def _pressed(press: Any, inputs: dict[str, Any], context: int, call: Call) -> Attended:
    key, value = call.key[:, :, :context], call.value[:, :, :context]
    angles = tuple(x[:, :context] for x in inputs["position_embeddings"])
    hidden = inputs["hidden_states"][:, :context]
    press.compress(call.module, hidden, key, value, None, {"position_embeddings": angles})
    _, heads, places = getattr(call.module, "masked_key_indices")  # noqa: B009 - a plain attribute, of kvpress
    kept = torch.ones(call.heads, context, dtype=torch.bool, device=key.device)
    kept[heads, places] = False
    return _behind(call, key, value, kept)


def _quantised(cache: QuantizedCache, context: int, call: Call) -> Attended:
    layer: Any = cache.layers[call.layer]
    key, value = (x[:, :, :context].contiguous() for x in (call.key, call.value))
    layer.lazy_initialization(key, value)
    key = layer._dequantize(layer._quantize(key, layer.axis_key))
    value = layer._dequantize(layer._quantize(value, layer.axis_value))
    return _behind(call, key, value, None)


def _behind(call: Call, key: Context, value: Context, kept: Bool[Tensor, "heads context"] | None) -> Attended:
    """The context attends itself, and what stands behind it attends itself and what is kept of the context."""
    context, tokens, group = key.shape[2], call.query.shape[2], call.query.shape[1] // call.heads
    whole = call.attend((HeadSpec(),) * call.heads)
    seen = torch.ones(tokens - context, tokens, dtype=torch.bool, device=key.device).tril(context)[None, None]
    if kept is not None:
        own = kept.new_ones(call.heads, tokens - context)
        seen = seen & torch.cat([kept, own], 1).repeat_interleave(group, 0)[None, :, None]
    keys, values = (
        torch.cat([old, new[:, :, context:]], 2).repeat_interleave(group, 1)
        for old, new in ((key, call.key), (value, call.value))
    )
    mine = dense_attention(call.module, call.query[:, :, context:], keys, values, seen, 0.0, {}, **call.options)
    return torch.cat([whole[:, :context], mine], 1)
