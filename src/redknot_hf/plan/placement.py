"""Which KV heads go to which rank of a tensor-parallel model, so that the ranks hold about as many bytes.

Heads hold different bytes, and transformers gives rank r the r-th slice of every layer's heads: as many heads, and
not as many bytes. So heads are put into another order. In each layer the heavy ones are dealt out in turn, each to
the rank that holds the least until now; then heads are exchanged as long as that levels the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .per_layer import kv_dims, kv_sources

if TYPE_CHECKING:
    from .plan import HeadPlan

Order = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Placement:
    """An order of a model's KV heads, for so many ranks.

    Attributes:
        plan: The plan in this order, which caches of the reordered model are made with.
        order: `order[layer][place]` is the KV head that comes to this place; rank r has the r-th slice of the places.
        ranks: How many there are.
        nbytes: Of each rank, for one sequence of the length that the order was made for.
    """

    plan: HeadPlan
    order: Order
    ranks: int
    nbytes: tuple[int, ...]

    @property
    def fullest(self) -> int:
        """The rank that holds most, which a budget of memory is to go by."""
        return max(range(self.ranks), key=self.nbytes.__getitem__)


def balanced(plan: HeadPlan, ranks: int, length: int, head_dim: Any = 128) -> Placement:
    """Return an order of a plan's heads in which tensor-parallel ranks hold about as many bytes.

    Args:
        plan: In the model's own order.
        ranks: Processes that share the model; each gets as many heads of every layer.
        length: Tokens of the sequences that are served, which decides what windows weigh against whole heads.
        head_dim: Elements of a key and of a value, or the pair of both; or the model's config, which must be given
            where layers share keys or differ in dims.

    Raises:
        ValueError: Some layer's heads are not a multiple of the ranks, or the config is another model's.
    """
    dims, sources = dims_of(plan, head_dim), sources_of(plan, head_dim)
    costs = [[spec.nbytes(length, *dim, 2) for spec in layer] for layer, dim in zip(plan, dims, strict=True)]
    order, nbytes = leveled(costs, ranks, sources)
    heads = ((layer[head] for head in places) for layer, places in zip(plan, order, strict=True))
    return Placement(type(plan)(heads, provenance=plan.provenance), order, ranks, nbytes)


def dims_of(plan: HeadPlan, head_dim: Any) -> tuple[tuple[int, int], ...]:
    """Elements of a key and of a value in each layer, of what is said for all, or of the model's config."""
    if _is_config(head_dim):
        plan.check(head_dim)
        return kv_dims(head_dim)
    return (head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim),) * len(plan)


def sources_of(plan: HeadPlan, head_dim: Any) -> tuple[int, ...]:
    """For each layer, that whose keys it attends: its own, unless the model's config says otherwise."""
    return kv_sources(head_dim) if _is_config(head_dim) else tuple(range(len(plan)))


def _is_config(head_dim: Any) -> bool:
    return hasattr(head_dim, "num_hidden_layers") or hasattr(head_dim, "get_text_config")


def leveled(costs: Sequence[Sequence[int]], ranks: int, sources: Sequence[int]) -> tuple[Order, tuple[int, ...]]:
    """An order of heads in which slices of as many heads cost about the same, and what each rank's then cost.

    Args:
        costs: Of each head of each layer.
        ranks: How many slices a layer has.
        sources: For each layer, that whose keys it uses; the heads of both stand in the same order. What it uses of
            another layer costs nothing.

    Raises:
        ValueError: A layer has no whole number of heads for each rank.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: give how many processes share the model, 1 or more")
    for i, layer in enumerate(costs):
        if len(layer) % ranks:
            raise ValueError(
                f"layer {i} has {len(layer)} KV heads, which {ranks} ranks cannot share evenly: give a number of "
                "ranks that divides them"
            )
    own = [i for i, source in enumerate(sources) if source == i]
    slices = _dealt({i: costs[i] for i in own}, ranks)
    _exchange(slices, costs, ranks)
    plain = {i: [[*range(r * len(costs[i]) // ranks, (r + 1) * len(costs[i]) // ranks)] for r in range(ranks)]
             for i in own}  # fmt: skip
    if max(_sums(plain, costs, ranks)) <= max(_sums(slices, costs, ranks)):
        slices = plain  # as good as it stands
    order = tuple(tuple(head for part in slices[source] for head in sorted(part)) for source in sources)
    return order, tuple(_sums(slices, costs, ranks))


def _dealt(costs: dict[int, Sequence[int]], ranks: int) -> dict[int, list[list[int]]]:
    """For each layer the heads of each rank: the heaviest first, to the rank with the least until now."""
    totals, slices = [0] * ranks, {}
    for i in sorted(costs, key=lambda i: min(costs[i]) - max(costs[i])):  # those that can level little come last
        layer, parts = costs[i], [[] for _ in range(ranks)]
        for head in sorted(range(len(layer)), key=lambda h: -layer[h]):
            rank = min((r for r in range(ranks) if len(parts[r]) < len(layer) // ranks), key=totals.__getitem__)
            parts[rank].append(head)
            totals[rank] += layer[head]
        slices[i] = parts
    return slices


def _exchange(slices: dict[int, list[list[int]]], costs: Sequence[Sequence[int]], ranks: int) -> None:
    """Exchanges two heads of the fullest and the emptiest rank, the best two first, until none level the sums more."""
    while True:
        totals = _sums(slices, costs, ranks)
        full, bare = max(range(ranks), key=totals.__getitem__), min(range(ranks), key=totals.__getitem__)
        gap = totals[full] - totals[bare]
        found = [
            (abs(gap - 2 * (costs[i][a] - costs[i][b])), i, a, b)
            for i, parts in slices.items()
            for a in parts[full]
            for b in parts[bare]
            if 0 < costs[i][a] - costs[i][b] < gap
        ]
        if not found:
            return
        _, i, a, b = min(found)
        parts = slices[i]
        parts[full][parts[full].index(a)], parts[bare][parts[bare].index(b)] = b, a


def _sums(slices: dict[int, list[list[int]]], costs: Sequence[Sequence[int]], ranks: int) -> list[int]:
    return [sum(costs[i][head] for i, parts in slices.items() for head in parts[r]) for r in range(ranks)]
