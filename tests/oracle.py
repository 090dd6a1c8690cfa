"""Dense attention under the explicit mask that a plan means: what every cached result is held against."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from redknot_hf import HeadPlan, HeadSpec

_plan: HeadPlan | None = None
_flags: Tensor | None = None  # of padding, where a mask function has made a matrix of them


def random_plan(config, seed: int = 0) -> HeadPlan:
    """A plan whose heads differ within every layer: some global, others with windows and sinks of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda options: options[int(torch.randint(len(options), (), generator=generator))]  # noqa: E731
    specs = [None, (1, 0), (3, 1), (7, 2), (16, 0), (17, 4), (40, 3)]
    draw = lambda: HeadSpec() if (s := pick(specs)) is None else HeadSpec(*s)  # noqa: E731
    return HeadPlan([[draw() for _ in layer] for layer in HeadPlan.uniform(config, HeadSpec())])


class _Flags(torch.Tensor):
    """Which slots are real, `[batch, 1, 1, slots]`, told from a row of a matrix."""


def choices(*windows, sink=0):
    """Specs of windows."""
    return [HeadSpec(window, sink) for window in windows]


@contextmanager
def under_plan(model: PreTrainedModel, plan: HeadPlan) -> Iterator[None]:
    """Every head of the model under its rule; forward passes take the whole sequence and `use_cache=False`."""
    global _plan
    parts = model.config.sub_configs
    switch = lambda name: model.set_attn_implementation({"text_config": name} if parts else name)  # noqa: E731
    before = model.config.get_text_config()._attn_implementation, _plan
    switch("masked_oracle")
    _plan = plan
    try:
        yield
    finally:
        switch(before[0])
        _plan = before[1]


@torch.no_grad()
def masked_logits(model: PreTrainedModel, plan: HeadPlan, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the whole sequence in one pass without a cache; a 4-D mask of bool stands in place of causality."""
    flags = torch.ones_like(ids) if mask is None or mask.ndim == 4 else mask
    positions = (flags.cumsum(-1) - 1).clamp(min=0)
    with under_plan(model, plan):
        return model(
            ids, attention_mask=flags if mask is None else mask, position_ids=positions, use_cache=False
        ).logits


def _kept_by(module) -> int:
    """The layer that keeps what this one attends: the last of its kind before those that share."""
    index, shared = module.layer_idx, getattr(module.config, "num_kv_shared_layers", 0)
    first = module.config.num_hidden_layers - shared
    if not shared or index < first:
        return index
    kinds = module.config.layer_types
    return max(i for i in range(first) if kinds[i] == kinds[index])


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """Every step spelled out; positions count real tokens."""
    assert _plan is not None
    layer = _kept_by(module)
    window = DynamicCache(config=module.config).layers[layer]
    reach = getattr(window, "sliding_window", None) or 1 << 30
    if isinstance(attention_mask, _Flags):
        real = attention_mask.as_subclass(Tensor)[:, 0, 0]
        position = real.cumsum(-1) - 1
        q, k = position[:, -query.shape[2] :, None], position[:, None, :]  # queries are the last
        shown = (k <= q) & real[:, None, :]
    else:  # what no query sees is padding
        shown = attention_mask[:, 0]
        position = (shown.any(1) if _flags is None else _flags[:, : key.shape[2]]).cumsum(-1) - 1
        q, k = position[:, -query.shape[2] :, None], position[:, None, :]
    shown = shown & (k > q - reach)
    seen = [shown & ((k > q - (s.window or 1 << 30)) | (k < s.sink)) for s in _plan[layer]]
    group = query.shape[1] // key.shape[1]
    seen = torch.stack(seen, 1).repeat_interleave(group, 1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query.float() @ key.float().transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.float()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weights @ value.float()).to(query.dtype).transpose(1, 2).contiguous(), None


def _mask(
    batch_size, kv_length, attention_mask=None, device="cpu", use_vmap=False, allow_is_causal_skip=True, **kwargs
):
    global _flags
    _flags = None
    if use_vmap or not allow_is_causal_skip:  # an overlay, of images say
        _flags = attention_mask
        common = {"attention_mask": attention_mask, "device": device, "use_vmap": use_vmap}
        return sdpa_mask(batch_size, kv_length=kv_length, allow_is_causal_skip=False, **common, **kwargs)
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    return attention_mask[:, None, None, :kv_length].as_subclass(_Flags)


AttentionInterface.register("masked_oracle", _attention)
AttentionMaskInterface.register("masked_oracle", _mask)
