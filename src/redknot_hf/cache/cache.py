"""The cache a user makes: `model.generate(..., past_key_values=RedKnotCache(model.config, plan))`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.growth import refuse_growth
from redknot_hf.plan.per_layer import text_config
from redknot_hf.plan.plan import HeadPlan, as_plan
from redknot_hf.plan.storage import HOT

from .adoption import adopt, extend, spans_of
from .counterparts import check_model, layers_of
from .handle import RedKnotHandle
from .layer import RedKnotLayer
from .picture import picture
from .span import Span
from .step import BROKEN_OFF
from .storage import Storage
from .takeover import call_of, refuse_takeover, switch_of


class RedKnotCache(Cache):
    """A KV cache in which every KV head keeps what its plan says, and the memory of the rest is never held.

    Pass it to `generate` or to a model's forward as `past_key_values`; the model must run with
    `attn_implementation="redknot"`. It grows page by page and is mutated by every forward pass. One cache serves one
    conversation or batch; `cache.fork()` makes another that holds the same, at the cost of its page tables.

    Source: RedKnot, arXiv 2606.06256 (head classes and SegPagedAttention).

    Args:
        config: The model's config, or the model.
        plan: Rule of every KV head, or the file of a plan; `HeadPlan.uniform(config, HeadSpec())` keeps everything.
        page_size: Tokens of a page: 16, 32, 64 or 128. Local rows keep up to two pages more than their window.
        max_cache_len: Slots, padding included, to reserve with the first forward pass, never to exceed; `None` grows.
            With it, and with Triton, decoding can be compiled and captured, and `generate` does so by itself.
        impl: `"torch"` (plain, any device) or `"triton"` (accelerators); `None` chooses by device.
        hot: The last tokens that heads with a storage of fewer bits keep as the model made them, and so do their
            first page and one that is not full. `crop` takes back as many.

    Raises:
        ValueError: The plan does not fit the model, the model cannot be served, or an argument is off.
        ImportError: `impl="triton"` without Triton.
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        plan: HeadPlan | AnyPath,
        *,
        page_size: int = 64,
        max_cache_len: int | None = None,
        impl: str | None = None,
        hot: int = HOT,
    ) -> None:
        self.config = text_config(config)
        check_model(self.config)
        self.plan = as_plan(plan, self.config)
        self._switch, self._given = switch_of(self.config), False
        super().__init__(layers=layers_of(self.config, self.plan, page_size, max_cache_len, impl, hot))
        self._first = next((i for i, layer in enumerate(self.layers) if isinstance(layer, RedKnotLayer)), 0)

    @classmethod
    def from_cache(
        cls,
        cache: Cache,
        plan: HeadPlan | AnyPath,
        config: PreTrainedConfig | PreTrainedModel,
        *,
        attention_mask: Shaped[Tensor, "batch slots"] | None = None,
        **options: Any,
    ) -> RedKnotCache:
        """Takes over what a `DynamicCache` holds, as far as a plan keeps it: a text is read with everything, then cut.

        Heads hold, element for element, what those of an all-global RedKnotCache would that had been given the same
        keys and values and then `compress(plan)`; steps go on from there. That is not what a cache of `plan` holds
        that read the text itself: its local heads saw their windows only, so behind the first layer keys and values
        differ, from the first token on that lies further into the text than some head sees back.

        Args:
            cache: Filled by the model, however it attended. It stays as it is: `del` it to have its memory back.
                Sliding layers may lack what the model's own window hides.
            plan, config: As for the class; from now on the model runs with `attn_implementation="redknot"`.
            attention_mask: Of the slots that `cache` holds, 0 for padding; without one every slot is a token.
            options: `page_size`, `max_cache_len`, `impl` and `hot`.

        Raises:
            TypeError: `cache` is no `DynamicCache`.
            ValueError: It is another model's, longer than `max_cache_len`, or has lost tokens that the plan needs; the
                mask is of other slots; or as the class raises.
        """
        filled = cls(config, plan, **options)
        adopt(filled.layers, cache, attention_mask)
        return filled

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands new keys and values on to the attention function.

        Raises:
            ValueError: The step does not fit the cache.
        """
        if torch.compiler.is_compiling():
            layer = self.layers[layer_idx]
            if isinstance(layer, RedKnotLayer) and layer.captures(key_states.shape[2]):
                return layer.update(key_states, value_states)
            return _update_eagerly(self, key_states, value_states, layer_idx)
        if layer_idx == self._first:
            self._catch_up()
        if layer_idx == self._first and len({x.history.slots for x in self._storages() if x.history.slots}) > 1:
            raise RuntimeError(BROKEN_OFF)
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the model has a layer {layer_idx} and the cache {len(self.layers)} layers: make the cache from "
                "model.config and a plan of this model"
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        # Asking takes transformers a while, and the first layer comes before any work. The config need not be the
        # running model's own, so what it says only explains why another than the attention function reads the keys.
        if layer_idx == self._first and isinstance(keys, RedKnotHandle):
            keys.redknot.said = self.config._attn_implementation
        return keys, values

    def fork(self) -> RedKnotCache:
        """A cache that holds the same and goes its own way: of a text that is read once, every question asks a fork.

        It costs page tables; pages are shared until either side writes to them. With `max_cache_len` they are copied.
        `copy.deepcopy(cache)` does the same.
        """
        return deepcopy(self)

    def spans(self, *, slack: bool = True) -> list[Span]:
        """What the cache holds of each sequence, packed: to be sent, saved, and put into another cache by `extend`.

        Copies, on the cache's device. Padding is left out. With `slack` they have all that rows hold, also what lies
        behind windows in pages that are not full, so that the other cache can be cropped as far as this one.

        Raises:
            ValueError: The cache holds nothing yet, or a layer keeps more than keys and values.
        """
        self._catch_up()
        if not self._batch():
            raise ValueError("the cache holds nothing yet: spans are of what a model has read")
        return spans_of(self.layers, self._batch(), slack)

    def extend(self, spans: Sequence[Span]) -> None:
        """Goes on with what other caches held, one span a sequence; the cache is filled, and must have been empty.

        Sequences of different length stand as if they had been padded on the left. The plan may keep less than the
        spans hold. Pages are on the device that the spans are on.

        Raises:
            ValueError: The cache holds tokens; the spans are another model's, too long, or lack what the plan needs.
        """
        extend(self.layers, spans)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Takes back the last slots of every sequence: a negative number; 0 gives spare memory back.

        Raises:
            ValueError: The number is positive, or reaches beyond what the rows keep; then nothing has changed.
        """
        for _, layer in row_layers(self):
            layer.check_crop(tokens_to_remove)
        super().crop(int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Int[Tensor, " batch"]) -> None:
        """Makes sequence i what sequence `beam_idx[i]` was, by its page tables."""
        index: Any = self._indices(beam_idx)
        for layer in self.layers:
            layer.reorder_cache(index)

    def batch_select_indices(self, indices: Int[Tensor, " selected"] | Bool[Tensor, " batch"]) -> None:
        """Keeps some sequences and gives the memory of the others back.

        With `max_cache_len` their pages are free for what is read later, and `nbytes` stays: what was reserved is one
        block of memory, at whose address captured steps read.
        """
        super().batch_select_indices(self._indices(indices))

    def compress(self, plan: HeadPlan | AnyPath) -> None:
        """Makes the cache obey a narrower plan, in place: pages of what heads keep no more are given back.

        Windows become shorter, storages coarser; later steps see what is kept, as if it had been read so. Forks keep
        what they hold, and the pages that both list. With `max_cache_len`, what is reserved becomes less too, and
        steps are captured anew. `cache.plan` is the new plan afterwards.

        Raises:
            ValueError: A head would see more than it keeps now, or finer; nothing has changed then.
        """
        plan = as_plan(plan, self.config)
        refuse_growth(self.plan, plan)
        for i, layer in row_layers(self):
            layer.compress(plan[i])
        self.plan = plan

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = False) -> None:
        """Moves the pages of one layer, or of all, to the host. The next step brings them back."""
        for i in self._chosen(layer_idx):
            super().offload(i, only_non_sliding)

    def prefetch(self, layer_idx: int | None = None, only_non_sliding: bool = False) -> None:
        """Moves the pages of one layer, or of all, to their device ahead of the next step."""
        for i in self._chosen(layer_idx):
            self.layers[i].prefetch()

    def __bool__(self) -> bool:
        """True; but models that drop a cache which a long text outgrows are to take an empty one as it is."""
        return self._switch is None or self.get_seq_length() > 0

    @property
    def _is_user_defined(self) -> bool:
        """Whether `generate` was given the cache; it says so before it runs the model."""
        return self._given

    @_is_user_defined.setter
    def _is_user_defined(self, given: bool) -> None:
        call = call_of(sys._getframe(1))
        if call is not None:
            refuse_takeover(call, self.plan, self._switch, self.get_seq_length())
        self._given = given

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are resident, free pages included; forks share pages, and each counts them."""
        return sum(layer.nbytes for _, layer in row_layers(self))

    @property
    def nbytes_by_storage(self) -> dict[str, int]:
        """The same by what pages hold: `"model"` for the model's dtype, and the storages of fewer bits that occur."""
        total = Counter(model=0)
        for storage in self._storages():
            total.update(storage.nbytes_by_storage)
        return dict(total)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that a cache of all tokens of all heads would hold now."""
        self._catch_up()
        held = ((x, x.rows.batch * x.rows.rules.heads * x.history.slots) for x in self._storages())
        return sum(rows * sum(part[:1, :1].nbytes for part in x.pool.pages) for x, rows in held)

    def __deepcopy__(self, memo: dict[int, Any]) -> RedKnotCache:
        """A fork: pages are shared until either side writes to them."""
        other = copy(self)
        memo[id(self)] = other
        other.layers = deepcopy(self.layers, memo)
        return other

    def __repr__(self) -> str:
        heads = [spec for _, layer in row_layers(self) for spec in layer.specs]
        return picture(heads, self.get_seq_length(), self._batch(), self.nbytes_by_storage, self.dense_nbytes)

    def _catch_up(self) -> None:
        """Lets the host know of captured steps; waits once for the device where there were none."""
        held = self._storages()
        for storage in held:
            if storage is held[0] or storage.history.slots != held[0].history.slots:
                storage.catch_up()

    def _storages(self) -> list[Storage]:
        return [layer.storage for _, layer in row_layers(self) if layer.is_initialized]

    def _indices(self, chosen: Tensor) -> Tensor:
        """Sequences as numbers from 0, whatever may index a batch: from the end, or as flags."""
        return torch.arange(self._batch())[torch.as_tensor(chosen).cpu()]

    def _batch(self) -> int:
        return next((x.rows.batch for x in self._storages()), 0)

    def _chosen(self, layer_idx: int | None) -> list[int]:
        chosen = range(len(self.layers)) if layer_idx is None else [layer_idx]
        return [i for i in chosen if isinstance(self.layers[i], RedKnotLayer)]


# The host does the bookkeeping of other steps, which no graph holds.
@torch.compiler.disable(
    reason="only steps of at most a page on a RedKnotCache with max_cache_len and impl='triton' are captured whole"
)
def _update_eagerly(cache: RedKnotCache, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    return cache.update(key, value, layer_idx)


def row_layers(cache: RedKnotCache) -> Iterator[tuple[int, RedKnotLayer]]:
    """The layers that hold keys, with their index."""
    return ((i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, RedKnotLayer))
