"""One layer of a RedKnotCache: rows of pages, and the steps that write to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from redknot_kernels import HeadRules, Kernels, RowView, implementation
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from redknot_hf.plan.rules import head_rules, local_specs
from redknot_hf.plan.spec import HeadSpec

from .device_rows import DeviceRows
from .handle import RedKnotHandle, Step
from .history import SlotHistory
from .pool import PagePool
from .row_views import RowViews
from .rows import Rows
from .widening import widen

# Tokens that a local row keeps beyond its window while the past is recorded, so that they can be taken back.
RECORDED = 512


class RedKnotLayer(CacheLayerMixin):
    """Keys and values of one layer, stored head by head.

    `update` stores nothing: it hands the new tokens to the attention function, which knows the padding mask and
    commits them. Lengths are counted twice: `slots` is what transformers counts, padding included; rows hold real
    tokens.

    Args:
        specs: Rule of each KV head of the whole model's layer.
        sliding_window: The model's own window for this layer; every head's rule is cut to it.
        page_size: Tokens of a page.
        max_cache_len: Slots to reserve at once and never to exceed; `None` grows page by page. With it, steps may be
            captured: then the device counts ahead, and the host asks it when it needs to know.
        impl: Name of the kernels that write and attend; `None` chooses by device.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        specs: tuple[HeadSpec, ...],
        sliding_window: int | None,
        page_size: int,
        max_cache_len: int | None,
        impl: str | None,
    ) -> None:
        super().__init__()
        self.specs = specs
        self.sliding_window = sliding_window
        self.page_size = page_size
        self.max_cache_len = max_cache_len
        self.impl = impl
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.pool: PagePool | None = None
        self.rows: Rows | None = None
        self.slots = 0
        self.is_initialized = False
        self.history = SlotHistory()
        self.rows_on_device = DeviceRows()
        self.row_views = RowViews()

    @property
    def is_compileable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether steps can be captured: everything is reserved, and the kernels read lengths on the device."""
        if self.max_cache_len is None:
            return False
        if self.is_initialized:
            return self.kernels.captured is not None
        return self.impl == "triton" or (self.impl is None and torch.accelerator.is_available())

    def captures(self, tokens: int) -> bool:
        """Whether a step of so many tokens can be captured now."""
        return self.is_initialized and self.is_compileable and tokens <= self.page_size

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes device, dtype, batch and this process's heads from the first keys and values."""
        batch, heads = key_states.shape[:2]
        self.batch_size = batch
        self.dtype, self.device = value_states.dtype, key_states.device
        self.kernels: Kernels = implementation(self.impl, self.device)
        self.rules = self._head_rules(heads, RECORDED if self.record_past else 0)
        self.rows = Rows(batch, self.rules)
        pages = None
        if self.max_cache_len is not None:
            pages = int(self.rows.pages_needed(np.full(batch, self.max_cache_len)).sum())
        dims = (key_states.shape[-1], value_states.shape[-1])
        self.pool = PagePool(self.page_size, dims, self.dtype, self.device, pages)
        self.pool.hold(self.rows)
        self.is_initialized = True
        self._settle()

    # `update` promises tensors and returns handles: the attention function needs the layer, and this is its way.
    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[RedKnotHandle, RedKnotHandle]:
        """Hands new keys and values to the attention function; nothing is stored yet.

        Raises:
            ValueError: The batch is not the cache's, or `max_cache_len` would be exceeded.
        """
        if torch.compiler.is_compiling():  # what the host would check, it checks between steps
            step = Step(self, key_states, value_states, 0)
            return RedKnotHandle.wrap(key_states, step), RedKnotHandle.wrap(value_states, step)
        batch, _, tokens, _ = key_states.shape
        self._check_room(tokens)
        if not self.is_initialized or (self.slots == 0 and batch != self.batch_size):
            self._clear()
            self.lazy_initialization(key_states, value_states)
        if batch != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} sequences and got keys of {batch}. Call "
                "cache.batch_repeat_interleave(n) to continue every sequence n times (num_return_sequences, beams), "
                "or use a new cache."
            )
        if value_states.dtype != self.dtype:
            raise ValueError(
                f"the cache holds {self.dtype} and got values of {value_states.dtype}: a cache serves a model of one "
                "dtype; use a new cache"
            )
        # Under autocast keys come out of RoPE wider than values; both are stored as attention will see them.
        key, value = key_states.to(self.dtype), value_states
        if torch.is_grad_enabled():
            key, value = key.detach(), value.detach()
        step = Step(self, key, value, self.slots)
        return RedKnotHandle.wrap(key_states, step), RedKnotHandle.wrap(value_states, step)

    def get_seq_length(self) -> int:
        """Slots seen, padding included; inside of `torch.compile` a tensor."""
        if torch.compiler.is_compiling() and self.is_compileable and self.is_initialized:
            return self.rows_on_device.counts[-1]  # pyright: ignore[reportReturnType]
        if not torch.compiler.is_compiling():
            self.catch_up()
        return self.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the mask describes.

        That is every slot, since rows that dropped tokens still need to know about padding. But of a step that may be
        captured it is the new slots only, so that the mask of every step has the same shape.
        """
        seen = self.get_seq_length()
        if self.captures(query_length):
            if not torch.compiler.is_compiling():
                self._check_room(query_length)
            return query_length, seen
        return seen + query_length, 0

    def get_max_length(self) -> int:
        """Most slots, or -1."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Drops all tokens and their memory, but not what `max_cache_len` reserved; pages of forks stay theirs."""
        if self.max_cache_len is None or self.rows is None or self.pool is None:
            self._clear()
            return
        with self.pool.lock:
            self.rows.cut(np.zeros_like(self.rows.lengths))
            self.slots, self.history = 0, SlotHistory()
            self._settle()
            for part in self.pool.pages:
                part.zero_()  # what was there need not stay readable

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Takes back the last slots: a negative number of them, or 0 to give spare memory back.

        Raises:
            ValueError: The number is positive, or reaches beyond what the rows keep.
        """
        lengths = self.lengths_after_crop(tokens_to_remove)
        if self.rows is None or self.pool is None:
            return
        with self.pool.lock:
            if lengths is not None:
                self.slots += int(tokens_to_remove)
                self.history.drop_last(-int(tokens_to_remove))
                self.rows.cut(lengths)
            self._shrink()
            self._settle()

    def activate_past_recording(self) -> None:
        """Keeps `RECORDED` more tokens per local row from now on, so that as many can be taken back by `crop`."""
        if not self.record_past and self.pool is not None:
            self.catch_up()
            with self.pool.lock:
                self._widen()
        self.record_past = True

    def offload(self) -> None:
        """Moves the pages to the host; the next step, or `prefetch`, brings them back."""
        if self.pool is not None:
            with self.pool.lock:
                self.pool.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Moves the pages to the layer's device."""
        if self.pool is not None:
            with self.pool.lock:
                self.bring_back()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes sequence i what sequence `beam_idx[i]` was; pages are shared until they are written."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continues every sequence `repeats` times; pages are shared until they are written."""
        if self.rows is not None:
            self._select(torch.arange(self.rows.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences and gives the memory of the others back."""
        self._select(indices)
        self.history.forget_padding()
        if self.pool is not None:
            with self.pool.lock:
                self._shrink()

    # What committing a step calls; whoever does holds the pool's lock

    def bring_back(self) -> None:
        """Moves the pages to the layer's device, and frees those that nobody holds any more."""
        _, pool = self.storage()
        pool.collect()
        if pool.pages.device != self.device:
            pool.to(self.device)

    def reserve(self, lengths: Int[np.ndarray, " batch"]) -> None:
        """Gives every row the pages to hold sequences of these lengths, and pages of its own where it will write."""
        rows, pool = self.storage()
        if self.max_cache_len is not None:  # a captured step cannot ask for pages
            lengths = np.full(rows.batch, self.max_cache_len)
        if rows.has_room(lengths):
            return
        allocate = lambda count: pool.allocate(count, spare=rows.unbounded)  # noqa: E731
        if pool.shared:
            pool.copy(*rows.unshare(lengths, pool.references.counts, allocate))
        if pool.alone(rows) and rows.pages_missing(lengths) > pool.free:
            pool.lay_out(rows, lengths)  # growing copies everything in any case
        else:
            rows.reserve(lengths, allocate)

    def on_device(self) -> DeviceRows:
        """The rows as kernels read them, up to date."""
        rows, pool = self.storage()
        self.rows_on_device.refresh(rows, self.slots, pool.pages.device)  # another holder may have moved the pool
        return self.rows_on_device

    def table_on_device(self) -> Int[Tensor, "batch heads columns"]:
        """The page table alone, up to date."""
        rows, pool = self.storage()
        self.rows_on_device.refresh_table(rows, pool.pages.device)
        return self.rows_on_device.table

    def views(self) -> tuple[RowView, ...] | None:
        """The rows as plain tensors, where kernels take them, rows are equally long, and pages lie in runs."""
        rows, pool = self.storage()
        return self.row_views.refresh(rows, pool) if self.kernels.step_in_views and rows.level else None

    def advance(
        self, step: Step, counts: Int[np.ndarray, " batch"], real: Bool[Tensor, "batch tokens"] | None
    ) -> None:
        """Counts a step that has been written."""
        rows, _ = self.storage()
        rows.advance(counts)
        self.slots += step.tokens
        self.history.add(step.tokens if real is None else real)
        step.real, step.written = real, True

    def catch_up(self) -> None:
        """Takes over what captured steps have counted on the device; waits for it.

        Raises:
            RuntimeError: A captured step had padding for some sequences only, and the host does not know where.
        """
        if self.rows is None or not self.is_compileable:
            return
        counts = self.rows_on_device.read_counts()
        more = counts[:-1] - self.rows.lengths
        if counts[-1] == self.slots:
            return
        if (more != counts[-1] - self.slots).any():
            raise RuntimeError(
                "a compiled step had padding in some sequences, and only the device knows where: pass all of a batch "
                "real tokens in compiled steps, or call cache.reset()."
            )
        self.rows.advance(more)
        self.history.add(int(counts[-1]) - self.slots)
        self.slots = int(counts[-1])
        self.rows_on_device.advanced(self.rows, self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages; they may be shared with a fork."""
        if self.pool is None:
            return 0
        with self.pool.lock:
            self.pool.collect()
            return self.pool.nbytes

    def lengths_after_crop(self, tokens_to_remove: int | Tensor) -> Int[np.ndarray, " batch"] | None:
        """Tokens of each sequence after a crop; `None` if there is nothing to take back. Raises as `crop` does."""
        self.catch_up()
        removed = -int(tokens_to_remove)
        if removed < 0:
            raise ValueError(f"crop({-removed}): pass the number of slots to take back as a negative number")
        if removed == 0 or self.rows is None:
            return None
        if removed > self.slots:
            raise ValueError(f"crop(-{removed}) takes back more than the {self.slots} slots of the cache")
        lengths = self.rows.lengths - self.history.real_among_last(removed, self.rows.batch)
        missing = self.rows.missing_after(lengths)
        if missing:
            raise ValueError(
                f"crop(-{removed}) reaches {missing} tokens beyond what the local heads keep behind their windows. "
                f"Call cache.activate_past_recording() first (it keeps {RECORDED} tokens more), or use larger pages."
            )
        return lengths

    def __getstate__(self) -> dict[str, Any]:
        """With the pages of its own rows only, whoever else holds pages of the pool."""
        if self.pool is None or self.rows is None:
            return vars(self)
        self.catch_up()
        with self.pool.lock:
            pool, rows = self.pool.part(self.rows)
        return {**vars(self), "pool": pool, "rows": rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.pool is not None and self.rows is not None:
            self.pool.hold(self.rows)
            self._settle()

    def __deepcopy__(self, memo: dict[int, Any]) -> RedKnotLayer:
        """A fork: the same pages, copied when either side writes to them; with `max_cache_len`, pages of its own."""
        self.catch_up()
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.history = self.history.fork()
        other.rows_on_device, other.row_views = DeviceRows(), RowViews()
        if self.pool is not None and self.rows is not None:
            with self.pool.lock:
                other.rows = self.rows.fork()
                other.pool = self.pool if self.max_cache_len is None else self.pool.clone()
                other.pool.hold(other.rows)
            other._settle()
        memo[id(self)] = other
        return other

    # The steps of the above

    def _check_room(self, tokens: int) -> None:
        if self.max_cache_len is not None and self.slots + tokens > self.max_cache_len:
            raise ValueError(
                f"{self.slots} slots are used and {tokens} more exceed max_cache_len={self.max_cache_len}. Make the "
                "cache with a larger max_cache_len, or with none, so that it grows."
            )

    def storage(self) -> tuple[Rows, PagePool]:
        """The rows and their pages.

        Raises:
            RuntimeError: No forward pass has been made yet.
        """
        if self.rows is None or self.pool is None:
            raise RuntimeError("the layer holds nothing yet: it takes its shape from the first forward pass")
        return self.rows, self.pool

    def _head_rules(self, heads: int, slack: int) -> HeadRules:
        return head_rules(local_specs(self.specs, heads), self.page_size, self.sliding_window, slack)

    def _shrink(self) -> None:
        if self.pool is not None:
            self.pool.collect()
            self.pool.shrink()

    def _settle(self) -> None:
        """With `max_cache_len`: reserves everything and brings it to the device, where captured steps will look."""
        if self.max_cache_len is None or self.rows is None or self.pool is None:
            return
        self.pool.grow(int(self.rows.pages_needed(np.full(self.rows.batch, self.max_cache_len)).sum()))
        self.reserve(self.rows.lengths)
        self.on_device()
        for part in self.pool.pages:
            torch._dynamo.mark_static_address(part, guard=False)

    def _select(self, index: Tensor) -> None:
        if self.rows is None or self.pool is None:
            return
        self.catch_up()
        where = index.cpu()
        self.history.select(where)
        with self.pool.lock:
            self.rows.select(where.numpy())
            self.batch_size = self.rows.batch
            self._settle()

    def _widen(self) -> None:
        rows, pool = self.storage()
        self.rules = self._head_rules(rows.rules.heads, RECORDED)

        def reserve() -> None:
            if self.max_cache_len is not None:  # longer rings than were reserved
                pool.grow(int(rows.pages_needed(np.full(rows.batch, self.max_cache_len)).sum()))
            self.reserve(rows.lengths)

        widen(rows, pool, self.rules, reserve)
        self._shrink()
        self._settle()
