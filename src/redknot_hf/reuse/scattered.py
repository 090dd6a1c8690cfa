"""What a model takes for its cache in a pass whose tokens stand apart, at positions of their own."""

from typing import Any

from transformers import Cache

from redknot_hf.attention.devices import devices_of_layers
from redknot_hf.cache.cache import RedKnotCache, row_layers

from .segment import Segment


class ScatteredPass(Cache):
    """Says of itself that nothing stands before a step; whoever derives from it attends by positions."""

    # What the mask is made from: it is to say nothing of what stands before, and to be none of a captured step.
    is_compileable = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No tokens stand before a step: zero."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """No tokens stand before a step: zero."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The step's tokens alone; their positions say what they see."""
        return query_length, 0


def initialize(cache: RedKnotCache, model: Any, segment: Segment, batch: int) -> None:
    """Gives the layers of a cache their shapes where no forward pass has yet; they hold no tokens afterwards."""
    bare = [(index, layer) for index, layer in row_layers(cache) if not layer.is_initialized]
    devices = devices_of_layers(model, len(cache.layers)) if bare else []  # all at once: it walks the model
    for index, layer in bare:
        kept = segment.layers[index]
        assert kept is not None
        heads, like = len(kept.window), segment.data.new_empty(0, dtype=segment.dtype).to(devices[index])
        shapes = ((batch, heads, 0, dim) for dim in (kept.key_dim, kept.value_dim))
        layer.lazy_initialization(*(like.new_empty(shape) for shape in shapes))
