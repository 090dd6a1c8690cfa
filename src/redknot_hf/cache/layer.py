"""One layer of a RedKnotCache: transformers' verbs over the storage of its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from redknot_kernels import HeadRules, implementation
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from redknot_hf.plan.rules import head_rules, local_specs
from redknot_hf.plan.spec import HeadSpec

from .handle import RedKnotHandle
from .step import Step
from .storage import Storage

# Tokens that a local row keeps beyond its window while the past is recorded, so that they can be taken back.
RECORDED = 512


class RedKnotLayer(CacheLayerMixin):
    """Keys and values of one layer, stored head by head.

    `update` stores nothing: it hands the new tokens to the attention function, which knows the padding mask and
    has them written. Slots are what transformers counts, padding included; rows hold real tokens.

    Args:
        specs: Rule of each KV head of the whole model's layer.
        sliding_window: The model's own window for this layer; every head's rule is cut to it.
        page_size: Tokens of a page.
        max_cache_len: Slots to reserve at once and never to exceed; `None` grows page by page. With it, steps may be
            captured: then the device counts ahead, and the host asks it when it needs to know.
        impl: Name of the kernels that write and attend; `None` chooses by device.
        hot: The last tokens that stored heads keep as the model made them.
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
        hot: int,
    ) -> None:
        super().__init__()
        self.specs = specs
        self.sliding_window = sliding_window
        self.page_size = page_size
        self.max_cache_len = max_cache_len
        self.impl = impl
        self.hot = hot
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self._storage: Storage | None = None
        self.is_initialized = False

    @property
    def storage(self) -> Storage:
        """The tokens.

        Raises:
            RuntimeError: No forward pass has been made yet.
        """
        if self._storage is None:
            raise RuntimeError("the layer holds nothing yet: it takes its shape from the first forward pass")
        return self._storage

    @property
    def is_compileable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether steps can be captured: everything is reserved, and the kernels read lengths on the device."""
        if self.max_cache_len is None:
            return False
        if self._storage is not None:
            return self._storage.compileable
        return self.impl == "triton" or (self.impl is None and torch.accelerator.is_available())

    def captures(self, tokens: int) -> bool:
        """Whether a step of so many tokens can be captured now."""
        return self._storage is not None and self._storage.captures(tokens)

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes device, dtype, batch and this process's heads from the first keys and values."""
        self.batch_size, heads = key_states.shape[:2]
        self.dtype, self.device = value_states.dtype, key_states.device
        rules = self._rules(heads, RECORDED if self.record_past else 0)
        dims, kernels = (key_states.shape[-1], value_states.shape[-1]), implementation(self.impl, self.device)
        self._storage = Storage(
            self.batch_size, rules, dims, self.dtype, self.device, kernels, reserved=self.max_cache_len
        )
        self.is_initialized = True

    def begin(self, key_states: Tensor, value_states: Tensor) -> None:
        """Forgets what shape the layer had, and takes another."""
        self._clear()
        self.lazy_initialization(key_states, value_states)

    # `update` promises tensors and returns handles: the attention function needs the layer, and this is its way.
    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[RedKnotHandle, RedKnotHandle]:
        """Hands new keys and values to the attention function; nothing is stored yet.

        Raises:
            ValueError: The batch is not the cache's, or `max_cache_len` would be exceeded.
        """
        batch, _, tokens, _ = key_states.shape
        if torch.compiler.is_compiling():  # what the host would check, it checks between steps
            step = Step(self.storage, key_states, value_states, tokens, 0)
            return RedKnotHandle.wrap(key_states, step), RedKnotHandle.wrap(value_states, step)
        storage = self._storage
        if self.max_cache_len is not None:
            self._check_room(tokens)
        if storage is None or (batch != self.batch_size and storage.history.slots == 0):
            self.begin(key_states, value_states)
            storage = self.storage
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
        step = Step(storage, key, value, tokens, storage.history.slots)
        return RedKnotHandle.wrap(key_states, step), RedKnotHandle.wrap(value_states, step)

    def get_seq_length(self) -> int:
        """Slots seen, padding included; inside of `torch.compile` a tensor."""
        if self._storage is None:
            return 0
        if not torch.compiler.is_compiling():
            self._storage.catch_up()
        elif self._storage.compileable:
            return self._storage.mirror.counts[-1]  # pyright: ignore[reportReturnType]
        return self._storage.history.slots

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
        if self.max_cache_len is None or self._storage is None:
            self._clear()
        else:
            self._storage.clear()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Takes back the last slots: a negative number of them, or 0 to give spare memory back.

        Raises:
            ValueError: The number is positive, or reaches beyond what the rows keep.
        """
        self.check_crop(tokens_to_remove)
        if self._storage is not None:
            self._storage.cut(-int(tokens_to_remove))

    def check_crop(self, tokens_to_remove: int | Tensor) -> None:
        """Raises as `crop` does, and takes nothing back."""
        removed = -int(tokens_to_remove)
        if removed < 0:
            raise ValueError(f"crop({-removed}): pass the number of slots to take back as a negative number")
        slots = self.get_seq_length()
        if removed == 0 or self._storage is None:
            return
        if removed > slots:
            raise ValueError(f"crop(-{removed}) takes back more than the {slots} slots of the cache")
        if missing := self._storage.missing_after_cut(removed):
            raise ValueError(
                f"crop(-{removed}) reaches {missing} tokens beyond what local heads keep behind windows, or what "
                f"stored heads keep hot. Call cache.activate_past_recording() first (to keep {RECORDED} tokens), "
                "or use larger pages, or a larger hot=."
            )

    def activate_past_recording(self) -> None:
        """Keeps `RECORDED` more tokens per local row from now on, so that as many can be taken back by `crop`."""
        if not self.record_past and self._storage is not None:
            self._storage.change_rules(self._rules(self._storage.rows.rules.heads, RECORDED))
        self.record_past = True

    def compress(self, specs: tuple[HeadSpec, ...]) -> None:
        """Lets every head keep what narrower rules say of what it holds, and gives the rest of the pages back."""
        self.specs = specs
        if self._storage is not None:
            rules = self._rules(self._storage.rows.rules.heads, RECORDED if self.record_past else 0)
            self._storage.change_rules(rules)

    def offload(self) -> None:
        """Moves the pages to the host; the next step, or `prefetch`, brings them back."""
        if self._storage is not None:
            self._storage.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Moves the pages to the layer's device."""
        if self._storage is not None:
            self._storage.to(self.device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes sequence i what sequence `beam_idx[i]` was; pages are shared until they are written."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continues every sequence `repeats` times; pages are shared until they are written."""
        if self._storage is not None:
            self._select(torch.arange(self._storage.rows.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences and gives the memory of the others back."""
        self._select(indices, shrink=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages; they may be shared with a fork."""
        return 0 if self._storage is None else self._storage.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> RedKnotLayer:
        """A fork: the same pages, copied when either side writes to them; with `max_cache_len`, pages of its own."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), _storage=None if self._storage is None else self._storage.fork())
        memo[id(self)] = other
        return other

    def _check_room(self, tokens: int) -> None:
        slots = 0 if self._storage is None else self._storage.history.slots
        if self.max_cache_len is not None and slots + tokens > self.max_cache_len:
            raise ValueError(
                f"{slots} slots are used and {tokens} more exceed max_cache_len={self.max_cache_len}. Make the "
                "cache with a larger max_cache_len, or with none, so that it grows."
            )

    def _rules(self, heads: int, slack: int) -> HeadRules:
        hot = max(self.hot, slack)  # what is recorded may be taken back
        return head_rules(local_specs(self.specs, heads), self.page_size, self.sliding_window, slack, hot)

    def _select(self, index: Tensor, shrink: bool = False) -> None:
        if self._storage is not None:
            self._storage.select(index.cpu(), shrink)
            self.batch_size = self._storage.rows.batch


def lengths_of(cache: Cache, batch: int) -> Int[np.ndarray, " batch"]:
    """Real tokens of each sequence of a RedKnotCache; zeros for a batch that is yet to come."""
    layers = (layer for layer in cache.layers if isinstance(layer, RedKnotLayer) and layer.is_initialized)
    held = next((layer.storage.rows.lengths for layer in layers), None)
    return np.zeros(batch, np.int64) if held is None else held
