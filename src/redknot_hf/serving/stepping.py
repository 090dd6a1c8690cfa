"""What a model takes for its cache in a step of all seats: layers of these, which hand keys on to their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from redknot_kernels import Cold
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from redknot_hf.cache.handle import RedKnotHandle
from redknot_hf.cache.step import Output, Query, Step
from redknot_hf.cache.storage import Storage

from .memory import SeatMemory


class ColdCounts:
    """How many pages of each stored row are cold, as kernels read and advance it, which they do layer by layer.

    Attributes:
        of: Of each layer with stored heads, `[seats, heads]`; zero for heads that are not stored.
    """

    def __init__(self, layers: dict[int, Storage], seats: int, device: torch.device) -> None:
        rules = {i: x.rows.rules for i, x in layers.items() if x.rows.rules.stored_heads}
        stored = [np.tile(np.array(x.storage) > 0, (seats, 1)) for x in rules.values()]
        of_seat = [np.repeat(np.arange(seats), x.heads) for x in rules.values()]
        self._stored = self._seat = self._flat = torch.zeros(0, dtype=torch.int32, device=device)
        if rules:
            self._stored = torch.from_numpy(np.concatenate([x.ravel() for x in stored]).astype(np.int32)).to(device)
            self._seat = torch.from_numpy(np.concatenate(of_seat).astype(np.int32)).to(device)
            self._flat = torch.zeros_like(self._stored)
        parts = self._flat.split([seats * x.heads for x in rules.values()]) if rules else ()
        self.of = {i: part.view(seats, -1) for i, part in zip(rules, parts, strict=True)}

    def set(self, cold: Int[Tensor, " seats"]) -> None:
        """Tells them to all layers."""
        if self.of:
            torch.mul(cold.index_select(0, self._seat), self._stored, out=self._flat)


class Batch(Cache):
    """What the model takes for its cache in a step of decoding: it hands keys on to the rows of the seats."""

    def __init__(
        self,
        memory: SeatMemory,
        hot: Mapping[int, Int[Tensor, "seats heads columns"]],
        cold: Mapping[int, Int[Tensor, "seats heads cold_columns"]],
        counts: Iterable[Int[Tensor, " seats_and_one"]],
        frozen: Mapping[int, Int[Tensor, "seats heads"]],
        real: Bool[Tensor, "seats tokens"] | None,
    ) -> None:
        count = dict(zip(hot, counts, strict=True))
        layers = [
            BatchLayer(memory.layers[i], hot[i], count[i], real, cold.get(i), frozen.get(i)) if i in hot else layer
            for i, layer in enumerate(memory.root.layers)
        ]
        super().__init__(layers=layers)


class BatchLayer(CacheLayerMixin):
    """A layer of seats. Which of their new tokens are real it knows, so there is nothing to say about masks."""

    is_sliding = False

    def __init__(
        self,
        storage: Storage,
        table: Int[Tensor, "seats heads columns"],
        counts: Int[Tensor, " seats_and_one"],
        real: Bool[Tensor, "seats tokens"] | None,
        cold: Int[Tensor, "seats heads cold_columns"] | None,
        frozen: Int[Tensor, "seats heads"] | None,
    ) -> None:
        super().__init__()
        self.storage, self.table, self.counts, self.real = storage, table, counts, real
        rules = storage.rows.rules
        # As the operator of a compiled step takes them.
        self.bounds, self.most_kept = rules.tensors(table.device), rules.most_kept(table.shape[2])
        self.cold: Cold | None = None
        if cold is not None and frozen is not None:
            int8, int4 = (None if x is None else x.pool.pages for x in map(storage.cold.parts.get, (8, 4)))
            self.cold = Cold(int8, int4, cold, frozen)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pools are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Handles whose step is attended by this layer."""
        step = Step(
            self.storage, key_states, value_states, key_states.shape[2], 0, attend=self.attend, captured=self.captured
        )
        return RedKnotHandle.wrap(key_states, step), RedKnotHandle.wrap(value_states, step)

    def attend(self, step: Step, query: Query, mask: Any, options: dict[str, Any]) -> Output:
        """Writes the tokens to the rows of their seats, and attends them; layers that share keys attend alone."""
        storage = self.storage
        rules, pages = storage.rows.rules, storage.pool.pages
        if step.written:
            counts = self.counts[:-1]
            return storage.kernels.decode(query, pages, self.table, counts, rules, cold=self.cold, **options)
        step.written = True
        return storage.kernels.step(
            query, pages, step.key, step.value, self.table, self.counts, self.real, rules, cold=self.cold, **options
        )

    def captured(self, step: Step, query: Query, options: dict[str, Any]) -> Output:
        """What `attend` does, inside of `torch.compile`."""
        storage, cold, new, stored = self.storage, self.cold, (step.key, step.value), {}
        if step.written:
            new = None, None
        if cold is not None:
            pools = (*(cold.int8 or (None, None)), *(cold.int4 or (None, None)))
            stored = {
                "stored": (*pools, cold.table, cold.counts, [*storage.rows.rules.storage], storage.rows.rules.hot)
            }
        step.written = True
        return storage.kernels.captured(  # pyright: ignore[reportOptionalCall]
            query, *storage.pool.pages, *new, self.table, self.counts, self.real, self.bounds, self.most_kept,
            storage.rows.rules.reach, options["scale"], options["softcap"], options["s_aux"], **stored,
        )  # fmt: skip

    def get_seq_length(self) -> int:
        """No mask describes the past."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The new tokens alone."""
        return query_length, 0

    def get_max_length(self) -> int:
        """None."""
        return -1
