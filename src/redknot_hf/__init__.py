"""A head-aware KV cache for Hugging Face Transformers.

Importing the package registers the attention and the mask function `"redknot"` and the pipeline
`"redknot-text-generation"`, and changes nothing for models that do not ask for them.
"""

from .attention.attention import redknot_attention
from .cache.argument import cache_argument
from .cache.cache import RedKnotCache
from .decoding import captured_decoding
from .guidance import guidance
from .pipeline import RedKnotPipeline
from .plan.plan import HeadPlan, HeadSpec
from .reuse.ask import ask
from .reuse.assemble import AssembledCache, assemble, prompt
from .reuse.refresh import refresh
from .reuse.schedule import by_rank
from .reuse.stand_in import StandIn
from .reuse.store import SegmentRef, SegmentStore
from .text.seams import Seams

__version__ = "0.1.0"

__all__ = [
    "AssembledCache",
    "HeadPlan",
    "HeadSpec",
    "RedKnotCache",
    "RedKnotPipeline",
    "Seams",
    "SegmentRef",
    "SegmentStore",
    "StandIn",
    "ask",
    "assemble",
    "by_rank",
    "cache_argument",
    "captured_decoding",
    "guidance",
    "prompt",
    "redknot_attention",
    "refresh",
]
