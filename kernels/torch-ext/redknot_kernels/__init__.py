"""Attention over pages of single KV heads: every function in plain PyTorch, which defines its meaning."""

from .implementations import NAMES, Kernels, implementation
from .plain.attend import add_sink_logit, attend, merge
from .plain.attend_at import attend_at
from .plain.cold import Cold, append, cool, place
from .plain.decode import decode, step
from .plain.pages import Pages, copy_pages, gather, gather_tokens, scatter_tokens
from .plain.prefill import Context, prefill, read_context
from .plain.quantise import ColdPages, cold_pool, dequantise_page, quantise_page
from .plain.rotation import Rotation, rotate
from .plain.views import Piece, RowView, step_in_views, view_rows
from .rules import UNBOUNDED, HeadRules

__all__ = [
    "NAMES",
    "UNBOUNDED",
    "Cold",
    "ColdPages",
    "Context",
    "HeadRules",
    "Kernels",
    "Pages",
    "Piece",
    "Rotation",
    "RowView",
    "add_sink_logit",
    "append",
    "attend",
    "attend_at",
    "cold_pool",
    "cool",
    "copy_pages",
    "decode",
    "dequantise_page",
    "gather",
    "gather_tokens",
    "implementation",
    "merge",
    "place",
    "prefill",
    "quantise_page",
    "read_context",
    "rotate",
    "scatter_tokens",
    "step",
    "step_in_views",
    "view_rows",
]
