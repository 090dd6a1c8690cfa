"""Tensor parallelism that balances: a model's KV heads, with their query heads, put into another order, once.

transformers gives rank r the r-th slice of every layer's heads. `HeadPlan.balanced` says an order in which the slices
hold about as many bytes; here the projections follow it. What the model computes stays the same, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.distributed.configuration_utils import DistributedConfig

from redknot_hf.plan.per_layer import kv_sources
from redknot_hf.plan.placement import Placement

# Where a projection's heads are: its axis, and whether they are query heads.
_AXES = {
    "q_proj.weight": (0, True), "q_proj.bias": (0, True), "q_norm.weight": (0, True), "sinks": (0, True),
    "k_proj.weight": (0, False), "k_proj.bias": (0, False), "k_norm.weight": (0, False),
    "v_proj.weight": (0, False), "v_proj.bias": (0, False), "o_proj.weight": (1, True),
}  # fmt: skip
_FUSED = ("qkv_proj.weight", "qkv_proj.bias")
# Parameters that know no heads: of what comes out, or one vector for all heads.
_PLAIN = ("o_proj.bias", "v_norm.weight")


def over_ranks(ranks: int | None = None) -> dict[str, Any]:
    """What `from_pretrained` takes for every rank to load its share of a model's heads, on its own device.

    Args:
        ranks: How many share it; by default all processes of the run.
    """
    return {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan="auto")}


@torch.no_grad()
def reorder_heads(model: nn.Module, placement: Placement) -> None:
    """Puts the heads of a model into the order of a placement: weights are mutated, one projection at a time.

    Under tensor parallelism every rank calls it, after `from_pretrained(..., **over_ranks())`; the ranks exchange
    their slices. A model in one process may be reordered too, and saved. Caches are made with `placement.plan` from
    then on: a plan in the old order would be of other heads.

    Raises:
        ValueError: The placement is of another model or number of ranks, or a weight cannot be reordered (an adapter,
            a quantised or offloaded weight, a projection that is not known); nothing has changed then.
    """
    config = getattr(model, "config", None)
    placement.plan.check(config)
    ranks = getattr(model, "tp_size", None) or 1
    if ranks not in (1, placement.ranks):
        raise ValueError(
            f"the placement is for {placement.ranks} ranks and the model is on {ranks}: "
            f"pass plan.balanced({ranks}, length)"
        )
    if any(placement.order[i] != placement.order[j] for i, j in enumerate(kv_sources(config))):
        raise ValueError("layers of the model share keys, and the placement orders them apart: pass "
                         "plan.balanced(ranks, length, model.config)")  # fmt: skip
    changes = [
        change
        for i, module in _attentions(model, len(placement.order)).items()
        if list(placement.order[i]) != sorted(placement.order[i])
        for change in _changes(f"layer {i}", module, placement.order[i])
    ]
    for parameter, axis, index in changes:
        _reorder(parameter, axis, index)


def _attentions(model: Any, layers: int) -> dict[int, Any]:
    """The attention of each layer of the text model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = {
        module.layer_idx: module
        for module in decoder.modules()
        if getattr(module, "layer_idx", None) is not None and hasattr(module, "o_proj")
    }
    if sorted(found) != list(range(layers)):
        raise ValueError(f"{type(model).__name__}: its {layers} layers have attention with o_proj in {sorted(found)}")
    return found


def _changes(
    where: str, module: Any, order: Sequence[int]
) -> Iterator[tuple[nn.Parameter, int, Int[Tensor, " entries"]]]:
    """Parameters of an attention that change, the axis, and where each entry comes from."""
    groups, heads = module.num_key_value_groups, len(order)
    queries = [head * groups + i for head in order for i in range(groups)]
    for name, parameter in module.named_parameters():
        if name in _PLAIN:
            continue
        if name not in _AXES and name not in _FUSED:
            raise ValueError(f"{where} has a parameter {name}, whose heads are not known: leave its heads as they "
                             "stand")  # fmt: skip
        axis, of_queries = _AXES.get(name, (0, True))
        size = parameter.shape[axis]
        if parameter.device.type == "meta" or not parameter.is_floating_point() or size % heads:
            raise ValueError(
                f"{where}: {name} of shape {tuple(parameter.shape)} in {parameter.dtype} on {parameter.device} cannot "
                "be reordered: load the model unquantised and in memory"
            )
        if "_norm" in name and size == module.head_dim:
            continue  # one for all heads
        if name in _FUSED:
            block = size // (heads * (groups + 2))
            parts = [_entries(queries, block), *[_entries(order, block)] * 2]
            starts = [0, heads * groups * block, heads * (groups + 1) * block]
            yield parameter, 0, torch.cat([part + start for part, start in zip(parts, starts, strict=True)])
        else:
            chosen = queries if of_queries else order
            yield parameter, axis, _entries(chosen, size // len(chosen))


def _entries(order: Sequence[int], block: int) -> Int[Tensor, " entries"]:
    """Rows of heads in another order, so many a head."""
    return (torch.tensor(order)[:, None] * block + torch.arange(block)).flatten()


def _reorder(parameter: nn.Parameter, axis: int, index: Int[Tensor, " entries"]) -> None:
    """Writes a parameter's entries in another order; the ranks of one that is spread over them exchange theirs."""
    if not hasattr(parameter, "full_tensor"):
        parameter.copy_(parameter.index_select(axis, index.to(parameter.device)))
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    whole = parameter.full_tensor()
    moved = whole.index_select(axis, index.to(whole.device))
    mine = distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(mine.to_local())
