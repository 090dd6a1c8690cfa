"""A head-aware KV cache for Hugging Face Transformers.

Importing the package registers the attention and the mask function `"redknot"`, and changes nothing for models that do
not ask for it.
"""

from .attention.attention import redknot_attention
from .cache.argument import cache_argument
from .cache.cache import RedKnotCache
from .decoding import captured_decoding
from .guidance import guidance
from .plan.plan import HeadPlan, HeadSpec
from .reuse.assemble import AssembledCache, assemble, prompt
from .reuse.refresh import refresh
from .reuse.schedule import by_rank
from .reuse.stand_in import StandIn
from .reuse.store import SegmentRef, SegmentStore

__version__ = "0.1.0"

__all__ = [
    "AssembledCache",
    "HeadPlan",
    "HeadSpec",
    "RedKnotCache",
    "SegmentRef",
    "SegmentStore",
    "StandIn",
    "assemble",
    "by_rank",
    "cache_argument",
    "captured_decoding",
    "guidance",
    "prompt",
    "redknot_attention",
    "refresh",
]
