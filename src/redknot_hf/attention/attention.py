"""The attention function `"redknot"`: writes a step to the cache and attends over what every head keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from redknot_kernels import add_sink_logit, attend, gather, read_context
from torch import Tensor, nn
from transformers import AttentionInterface

from redknot_hf.cache.commit import Output, Query, captured, runs, write, write_and_attend
from redknot_hf.cache.handle import RedKnotHandle, Run, Step

from .dense import dense_attention
from .mask import PaddingMask, describes_new_tokens, real_tokens

_NOTHING = nullcontext()
# A mask of the caller's own: bool (True is visible), or added to the scores.
Explicit = Bool[Tensor, "#batch #query_heads tokens slots"] | Float[Tensor, "#batch #query_heads tokens slots"]


def redknot_attention(
    module: nn.Module,
    query: Query,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Output, None]:
    """Attends with a RedKnotCache where there is one, and as any model does where there is none.

    The signature is transformers'. With a cache, `key` and `value` are handles: the new tokens are written to the rows
    (once, also if several layers share them), and every query sees what its head's rule says. No gradient flows
    through the cache.

    Raises:
        ValueError: Weights, dropout, a position bias or two-sided attention are asked of a cache.
    """
    if kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False)):
        raise ValueError(
            "output_attentions=True: the redknot attention never holds the weights. Load the model with "
            "attn_implementation='eager' to look at them."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"scale": scale, "softcap": kwargs.get("softcap"), "s_aux": kwargs.get("s_aux")}
    if not isinstance(key, RedKnotHandle):
        return dense_attention(module, query, key, value, attention_mask, dropout, kwargs, **options), None
    _refuse(module, dropout, kwargs)
    step = key.redknot
    if torch.compiler.is_compiling():
        tokens = query.shape[2]
        plain = attention_mask is None or describes_new_tokens(attention_mask, tokens)
        # Where a layer shares the keys, several tokens with padding among them are not the last of their rows.
        level = not step.written or attention_mask is None or tokens == 1
        if step.attend is None and plain and level and step.layer.captures(tokens):
            return captured(query, step, attention_mask, options), None
        return _attend_eagerly(query, step, attention_mask, options), None  # pyright: ignore
    return _attend(query, step, attention_mask, options), None


def _attend(query: Query, step: Step, mask: Tensor | None, options: dict[str, Any]) -> Output:
    query = query.to(step.value.dtype)  # under autocast RoPE leaves it wider
    with _plainly(query.device.type):
        if step.attend is not None:
            out = step.attend(step, query, mask, options)
        elif mask is None or _only_padding(mask, step):
            out = _paged(query, step, mask, options)
        else:
            _check_explicit(mask, query, step)
            out = _explicit(query, step, mask, options)
    return _NoGradient.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out


@torch.compiler.disable(reason="the host does the bookkeeping of this step of a RedKnotCache")  # pyright: ignore
def _attend_eagerly(query: Query, step: Step, mask: Tensor | None, options: dict[str, Any]) -> Output:
    return _attend(query, step, mask, options)


def _only_padding(mask: Tensor, step: Step) -> bool:
    """Whether a mask speaks of padding; one that speaks of a step's tokens alone is for steps that may be captured."""
    return isinstance(mask, PaddingMask) or (step.layer.is_compileable and describes_new_tokens(mask, step.tokens))


def _paged(query: Query, step: Step, mask: Tensor | None, options: dict[str, Any]) -> Output:
    layer = step.layer
    if not step.written:
        real = None
        if isinstance(mask, PaddingMask):
            real = mask.new_tokens(step.start, step.tokens, layer.storage()[0].lengths)
        elif mask is not None:
            real = real_tokens(mask)
        if step.tokens <= layer.page_size:
            return write_and_attend(query, step, real, options)
        write(step, real)
    step.runs = step.runs or runs(step, step.real)
    if len(step.runs) == 1 and step.runs[0].real is None:
        return _run(query, step, step.runs[0], options)
    batch, heads, tokens, _ = query.shape
    out = query.new_zeros(batch, tokens, heads, step.value.shape[-1])
    for run in step.runs:
        where = slice(None) if run.real is None else run.real
        out[run.sequences, where] = _run(run.take(query), step, run, options)
    return out


def _run(query: Query, step: Step, run: Run, options: dict[str, Any]) -> Output:
    layer = step.layer
    rows, pool = layer.storage()
    if query.shape[2] > layer.page_size:
        return layer.kernels.prefill(
            query, run.take(step.key), run.take(step.value), run.context, rows.rules, **options
        )
    with pool.lock:
        on_device = layer.on_device()
        table, lengths = on_device.table[run.sequences], on_device.counts[:-1][run.sequences]
        return layer.kernels.decode(query, pool.pages, table, lengths, rows.rules, **options)


def _explicit(query: Query, step: Step, mask: Explicit, options: dict[str, Any]) -> Output:
    """Attends under a mask of the caller's own, which says what comes after what; each head's window still holds."""
    layer = step.layer
    if step.past is None:
        with layer.storage()[1].lock:
            layer.bring_back()
            step.past = _read_past(step)
        write(step, None)
    out = query.new_empty(len(query), query.shape[2], query.shape[1], step.value.shape[-1])
    heads = step.key.shape[1]
    grouped = query.unflatten(1, (heads, -1))
    queries = step.start + torch.arange(step.tokens, device=query.device)[None]
    mask = mask.expand(-1, query.shape[1], -1, -1).unflatten(1, (heads, -1))
    s_aux = options["s_aux"]
    for rules, members, past, keys, values in step.past:
        positions = torch.cat([past, queries[0]])
        seen = rules.take((0,)).visible(queries, positions[None], causal=False)
        part = mask[:, members].flatten(1, 2)[..., positions]
        part = part & seen if part.dtype == torch.bool else part.masked_fill(~seen, -torch.inf)
        key, value = torch.cat([keys, step.key[:, members]], 2), torch.cat([values, step.value[:, members]], 2)
        found, lse = attend(
            grouped[:, members].flatten(1, 2),
            key,
            value,
            scale=options["scale"],
            mask=part,
            softcap=options["softcap"],
        )
        if s_aux is not None:
            found = add_sink_logit(found, lse, s_aux.unflatten(0, (heads, -1))[members].flatten())
        out.unflatten(2, (heads, -1))[:, :, members] = found.unflatten(1, (len(members), -1)).permute(0, 3, 1, 2, 4)
    return out


def _read_past(step: Step) -> list[tuple[Any, ...]]:
    """For each kind of head: its rules, its heads, and positions, keys and values of what it keeps."""
    rows, pool = step.layer.storage()
    table, rules, length = step.layer.on_device().table, rows.rules, step.start
    device = table.device
    past = []
    if rules.global_heads:
        heads = list(rules.global_heads)
        pages = table[:, heads, : -(-length // rules.page_size)]
        keys, values = (x[:, :, :length] for x in gather(pool.pages, pages))
        past.append((rules.take(rules.global_heads), heads, torch.arange(length, device=device), keys, values))
    context = read_context(pool.pages, table, length, rules)
    for (part, heads), (keys, values) in zip(rules.local_groups, context.bands, strict=True):
        held = min(part.sink[0], length)
        first = max(length - part.window[0] + 1, 0)
        again = max(held - first, 0)  # sinks that the band repeats
        positions = torch.cat([torch.arange(held, device=device), torch.arange(first + again, length, device=device)])
        keys, values = (torch.cat([x[:, :, :held], x[:, :, held + again :]], 2) for x in (keys, values))
        past.append((part, list(heads), positions, keys, values))
    return past


@contextmanager
def _without_gradients_and_autocast(device_type: str) -> Iterator[None]:
    on = torch.is_autocast_enabled(device_type)
    with torch.no_grad(), torch.autocast(device_type, enabled=False) if on else _NOTHING:
        yield


def _plainly(device_type: str) -> AbstractContextManager[None]:
    """Keeps gradients and autocast out of kernels, which choose their own precision; free where both are off."""
    needed = torch.is_grad_enabled() or torch.is_autocast_enabled(device_type)
    return _without_gradients_and_autocast(device_type) if needed else _NOTHING


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(f"dropout={dropout} with a RedKnotCache: call model.eval(), or train with use_cache=False")
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias, which a RedKnotCache cannot; use DynamicCache"
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{type(module).__name__} attends both ways and needs no RedKnotCache; use DynamicCache")


def _check_explicit(mask: Tensor, query: Query, step: Step) -> None:
    if step.layer.history.padded:
        raise ValueError(
            "a 4-D attention mask over a cache that skipped padding: its columns no longer are positions. Pass the "
            "2-D mask, or use one kind of mask from the first call on."
        )
    batch, heads, tokens, _ = query.shape
    slots = step.start + step.tokens
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    fits = fits and mask.shape[2] == tokens and mask.shape[3] >= slots
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"the attention mask is {list(mask.shape)} of {mask.dtype}: give [{batch}, 1, {tokens}, {slots}] of bool "
            "(True is visible) or of float (added to the scores), or the 2-D mask"
        )


class _NoGradient(torch.autograd.Function):
    """Lets a forward pass run outside of `no_grad`, and stops whoever would train through it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError("gradients do not flow through a RedKnotCache: train with use_cache=False")


AttentionInterface.register("redknot", redknot_attention)
