"""A head-aware KV cache for Hugging Face Transformers.

Importing the package registers the attention and the mask function `"redknot"`, and changes nothing for models that do
not ask for it.
"""

from .attention import redknot_attention
from .cache import RedKnotCache
from .captured_decoding import captured_decoding
from .plan import HeadPlan, HeadSpec
from .refresh import refresh
from .reuse import AssembledCache, assemble, prompt
from .segments import SegmentRef, SegmentStore

__all__ = [
    "AssembledCache",
    "HeadPlan",
    "HeadSpec",
    "RedKnotCache",
    "SegmentRef",
    "SegmentStore",
    "assemble",
    "captured_decoding",
    "prompt",
    "redknot_attention",
    "refresh",
]
