"""Looking into the attention of a model while it runs, and running it with restricted heads, without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from redknot_kernels import implementation
from redknot_kernels.plain.pages import head_index, take_heads
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from redknot_hf.attention.asked import attend_asked
from redknot_hf.attention.attention import attention_options
from redknot_hf.attention.mask import PaddingMask, redknot_mask
from redknot_hf.attention.stored import attend_stored
from redknot_hf.plan.per_layer import kv_heads
from redknot_hf.plan.plan import HeadPlan, HeadSpec
from redknot_hf.plan.rules import head_rules

_PAGE = 64  # rules ask for one, and without a cache nothing depends on it

Attended = Float[Tensor, "batch tokens query_heads value_dim"]
Asked = Float[Tensor, "batch asked query_heads value_dim"]


@dataclass(frozen=True)
class Call:
    """What one layer hands to its attention function, over whole sequences without padding.

    Attributes:
        module: The attention layer.
        layer: Its index.
        reach: The model's own sliding window, in tokens.
        options: `scale`, `softcap` and `s_aux`, as kernels take them.
    """

    module: nn.Module
    layer: int
    query: Float[Tensor, "batch query_heads tokens key_dim"]
    key: Float[Tensor, "batch heads tokens key_dim"]
    value: Float[Tensor, "batch heads tokens value_dim"]
    reach: int | None
    options: dict[str, Any]

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.key.shape[1]

    def attend(self, specs: tuple[HeadSpec, ...], rows: tuple[int, ...] | None = None) -> Asked:
        """The outputs of all query heads, every KV head under its spec; time is linear in tokens for local heads.

        Heads with a storage see cold pages as a cache gives them back that reads the text in chunks.

        Args:
            specs: One a KV head.
            rows: Queries that are asked for, ascending; by default all.
        """
        # A layer with a window of the model's own keeps its pages as they are.
        stores = [spec.storage if self.reach is None else "model" for spec in specs]
        where = None if rows is None else _index(rows, self.query.device)
        if set(stores) == {"model"}:
            return self._prefill(specs, rows)
        batch, query_heads, tokens, _ = self.query.shape
        asked = tokens if rows is None else len(rows)
        out = self.query.new_empty(batch, asked, query_heads, self.value.shape[-1])
        grouped = out.unflatten(2, (self.heads, -1))
        for storage in set(stores):
            heads = tuple(head for head, mine in enumerate(stores) if mine == storage)
            part = self._take(heads)
            if storage == "model":
                found = part._prefill(tuple(specs[head] for head in heads), rows)
            else:
                query = part.query if where is None else part.query[:, :, where]
                found = attend_stored(part.module, query, part.key, part.value, storage, part.options, rows)
            grouped.index_copy_(2, head_index(heads, out.device), found.unflatten(2, (len(heads), -1)))
        return out

    def _prefill(self, specs: tuple[HeadSpec, ...], rows: tuple[int, ...] | None) -> Asked:
        rules = head_rules(tuple(replace(spec, storage="model") for spec in specs), _PAGE, self.reach, 0)
        kernels = implementation(None, self.query.device)
        if rows is None:
            return kernels.prefill(self.query, self.key, self.value, None, rules, **self.options)
        where = _index(rows, self.query.device)
        if kernels.in_chunks is None:  # where masks do as well as kernels
            return attend_asked(self.query[:, :, where], self.key, self.value, rules, rows, self.options)
        return kernels.prefill(self.query, self.key, self.value, None, rules, **self.options)[:, where]

    def _take(self, heads: tuple[int, ...]) -> Call:
        """The call of some of the KV heads."""
        query = take_heads(self.query.unflatten(1, (self.heads, -1)), heads).flatten(1, 2)
        options = dict(self.options)
        if options["s_aux"] is not None:
            options["s_aux"] = options["s_aux"].unflatten(0, (self.heads, -1))[list(heads)].flatten()
        key, value = take_heads(self.key, heads), take_heads(self.value, heads)
        return replace(self, query=query, key=key, value=value, options=options)


@lru_cache(maxsize=4)  # all layers ask for the same
@torch.inference_mode(False)
def _index(rows: tuple[int, ...], device: torch.device) -> Int[Tensor, " rows"]:
    return torch.tensor(rows, device=device)


Watcher = Callable[[Call], Attended]


@contextmanager
def watching(model: PreTrainedModel, watcher: Watcher) -> Iterator[None]:
    """Every attention layer of the model asks the watcher for its output, for the duration.

    Forward passes take whole sequences, without padding and with `use_cache=False`. The model must run with
    `attn_implementation="redknot"`, and does so again afterwards.

    Raises:
        ValueError: The model runs with another attention implementation.
    """
    check_model(model)
    layers = [module for _, module in attention_layers(model)]
    for module in layers:
        module.redknot_watcher = watcher  # pyright: ignore[reportArgumentType] - a plain attribute
    model.set_attn_implementation("redknot_watched")
    try:
        yield
    finally:
        model.set_attn_implementation("redknot")
        for module in layers:
            del module.redknot_watcher


def restricted(plan: HeadPlan) -> Watcher:
    """A watcher under which every head keeps to its spec: what a RedKnotCache computes, without one."""
    return lambda call: call.attend(plan[call.layer])


def attention_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The attention layers of the model, which have an `o_proj`, and their names, in order."""
    found = [(name, m) for name, m in model.named_modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    return sorted(found, key=lambda pair: pair[1].layer_idx)  # pyright: ignore[reportCallIssue, reportArgumentType]


def read_whole(model: PreTrainedModel, ids: Int[Tensor, "1 tokens"]) -> None:
    """A forward pass over a whole prompt in which every layer sees every token, for whoever watches."""
    # Given as a number, layers that share keys would drop all tokens but the last (Gemma4).
    model(ids, use_cache=False, logits_to_keep=torch.tensor([ids.shape[1] - 1], device=ids.device))


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that hold the attention layers, in order: from stream to stream."""
    return [model.get_submodule(name.rpartition(".")[0]) for name, _ in attention_layers(model)]


@contextmanager
def forwards_restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Lets modules be given another `forward` for the duration; one that a hook had set, to move them, comes back."""
    own = [vars(module).get("forward") for module in modules]
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def check_model(model: PreTrainedModel) -> None:
    """Checks that a model can be profiled.

    Raises:
        ValueError: The model runs with another attention implementation, or a layer has no `o_proj`.
    """
    used = model.config.get_text_config(decoder=True)._attn_implementation
    if used != "redknot":
        raise ValueError(
            f"the model runs with attn_implementation={used!r}: load it with attn_implementation='redknot', or call "
            "model.set_attn_implementation('redknot')"
        )
    layers, wanted = len(attention_layers(model)), len(kv_heads(model.config))
    if layers != wanted:
        raise ValueError(
            f"{type(model).__name__} has {wanted} layers and {layers} attention layers with an o_proj: profiling "
            "knows models whose every layer attends and projects its output by a module o_proj"
        )


def _watched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None and not (isinstance(attention_mask, PaddingMask) and attention_mask.whole):
        raise ValueError("prompts are profiled one at a time and without padding: pass no attention mask")
    if query.shape[2] != key.shape[2]:
        raise ValueError("prompts are profiled whole: call the model with use_cache=False")
    options = attention_options(query, scaling, kwargs)
    reach = kwargs.get("sliding_window") or getattr(attention_mask, "window", None)
    watcher: Any = module.redknot_watcher
    layer: Any = module.layer_idx
    return watcher(Call(module, layer, query, key, value, reach, options)), None


AttentionInterface.register("redknot_watched", _watched_attention)
AttentionMaskInterface.register("redknot_watched", redknot_mask)
