"""Tiles of keys, in Triton: reading them, who sees them, and taking them into a softmax."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # a maximum to start from that is finite, so that differences are never NaN


@triton.jit
def load_rows(p_rows, held, DIM: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """Rows from pointers to their beginnings, `[rows, BLOCK]`; zeros where nothing is held."""
    o_d = tl.arange(0, BLOCK)
    mask = held[:, None] if DIM == BLOCK else held[:, None] & (o_d < DIM)
    block = tl.load(p_rows[:, None] + o_d, mask=mask, other=0.0)
    return block.to(tl.float32) if UPCAST else block  # the interpreter computes nothing right in bfloat16


@triton.jit
def sees(key, query, window, sink, reach):
    """Whether the query at one position sees the key at another."""
    return (key <= query) & ((key > query - window) | (key < sink)) & (key > query - reach)


@triton.jit
def accumulate(b_s, b_v, b_out, b_max, b_sum, factor):
    """Takes a tile of keys into the softmax; `factor` makes powers of two of the scores."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * factor)
    b_p = tl.exp2(b_s * factor - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_old[:, None], input_precision="ieee")
    return b_out, b_new, b_sum * b_old + tl.sum(b_p, 1)
