"""What a model takes for its cache in a pass whose tokens stand apart, at positions of their own."""

from transformers import Cache


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
