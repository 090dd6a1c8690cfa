"""Merging the splits of every row, in Triton, counting the new tokens, and letting pages grow cold."""

import triton
import triton.language as tl

from .pages import await_previous
from .quantise import cold_target, cool_row
from .tiles import LOG2E, LOWEST


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def merge_kernel(
    part_out, part_lse, shares, counts, flags, s_aux, out, tokens,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, FUSED: tl.constexpr, HAS_FLAGS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_SINK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merges the splits of every row."""
    await_previous(EARLY)
    _merge(
        part_out, part_lse, shares, counts, flags, s_aux, out, tokens, GROUP, VALUE_DIM, FUSED, HAS_FLAGS, BLOCK_T,
        BLOCK_B, BLOCK_S, BLOCK_V, HAS_SINK,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["stride_tb", "stride_th", "stride_cb", "stride_ch", "hot"],
    do_not_specialize_on_alignment=["tokens"],
)
def merge_and_cool_kernel(
    part_out, part_lse, shares, counts, flags, s_aux, out, tokens,
    k_pages, v_pages, table, bounds, codes8, scales8, codes4, scales4, signs, cold_table, cold_counts,
    stride_kp, stride_ks, stride_vp, stride_vs, stride_tb, stride_th, stride_cb, stride_ch, hot,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, FUSED: tl.constexpr, HAS_FLAGS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_SINK: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TURNED: tl.constexpr, COOL_D: tl.constexpr,
    COOL_V: tl.constexpr, INT8: tl.constexpr, INT4: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merges the splits of every row; a row's last program lets its pages grow cold that have left the hot tail."""
    await_previous(EARLY)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        _merge(
            part_out, part_lse, shares, counts, flags, s_aux, out, tokens, GROUP, VALUE_DIM, FUSED, HAS_FLAGS, BLOCK_T,
            BLOCK_B, BLOCK_S, BLOCK_V, HAS_SINK,
        )  # fmt: skip
    else:
        heads, batch = tl.num_programs(1), tl.num_programs(2)
        i_head, i_batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        i_row = i_batch * heads + i_head
        bits, ring = tl.load(bounds + 3 * heads + i_head), tl.load(bounds + 2 * heads + i_head)
        length = tl.load(shares + 2 * batch * heads + i_row)  # the counts are written meanwhile
        done, target = tl.load(cold_counts + i_row), cold_target(bits, length, hot, PAGE)
        if target > done:
            cool_row(
                k_pages, v_pages, k_pages, v_pages, table + i_batch * stride_tb + i_head * stride_th, codes8, scales8,
                codes4, scales4, signs, cold_table + i_batch * stride_cb + i_head * stride_ch, stride_kp, stride_ks,
                stride_vp, stride_vs, 0, 0, 0, 0, bits, done, target, ring, length, 0, 0, 1, DIM, VALUE_DIM, PAGE,
                TURNED, COOL_D, COOL_V, False, INT8, INT4, UPCAST,
            )  # fmt: skip
            tl.store(cold_counts + i_row, target)


@triton.jit
def _merge(
    part_out, part_lse, shares, counts, flags, s_aux, out, tokens,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, FUSED: tl.constexpr, HAS_FLAGS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Merges the splits of a row, for one of its queries and some channels of the values."""
    i_m, i_head, i_batch = tl.program_id(0) % (GROUP * tokens), tl.program_id(1), tl.program_id(2)
    o_v = tl.program_id(0) // (GROUP * tokens) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_s = tl.arange(0, BLOCK_S)
    heads, batch = tl.num_programs(1), tl.num_programs(2)
    i_row = i_batch * heads + i_head
    first, splits = tl.load(shares + i_row), tl.load(shares + batch * heads + i_row)
    # Every lane merges splits of its own; the lanes come together last.
    b_max, b_sum = tl.full([BLOCK_S], LOWEST, tl.float32), tl.zeros([BLOCK_S], tl.float32)
    b_out = tl.zeros([BLOCK_S, BLOCK_V], tl.float32)
    for start in range(0, splits, BLOCK_S):
        written = start + o_s < splits
        part = (first + start + o_s).to(tl.int64) * GROUP * tokens + i_m
        b_lse = tl.load(part_lse + part, mask=written, other=float("-inf"))
        mask = written[:, None] & (o_v < VALUE_DIM)
        b_part = tl.load(part_out + part[:, None] * VALUE_DIM + o_v, mask=mask, other=0.0)
        b_new = tl.maximum(b_max, b_lse)
        b_old, b_weight = tl.exp2(b_max - b_new), tl.exp2(b_lse - b_new)
        b_out = b_out * b_old[:, None] + b_part * b_weight[:, None]
        b_sum, b_max = b_sum * b_old + b_weight, b_new
    top = tl.max(b_max, 0)
    head = i_head * GROUP + i_m % GROUP
    if HAS_SINK:  # one more logit, with no value behind it
        logit = tl.load(s_aux + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, logit)
    b_weight = tl.exp2(b_max - top)
    total = tl.sum(b_sum * b_weight, 0)
    if HAS_SINK:
        total += tl.exp2(logit - top)
    b_row = tl.sum(b_out * b_weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    row = (i_batch * tokens + i_m // GROUP).to(tl.int64) * heads * GROUP + head
    tl.store(out + row * VALUE_DIM + o_v, b_row.to(out.dtype.element_ty), mask=o_v < VALUE_DIM)
    if FUSED:  # noqa: SIM102 - a constant, and the other is not
        if (tl.program_id(0) == 0) & (i_row == 0):  # nobody reads the counts in this launch
            _count(counts, flags, batch, tokens, HAS_FLAGS, BLOCK_B, BLOCK_T)


@triton.jit
def _count(counts, flags, batch, tokens, HAS_FLAGS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr):
    """Adds the new tokens to the lengths, and all slots of the step to the slots, which stand behind them."""
    o_b = tl.arange(0, BLOCK_B)
    more = tl.full([BLOCK_B], tokens, tl.int32)
    if HAS_FLAGS:
        o_t = tl.arange(0, BLOCK_T)
        here = (o_b < batch)[:, None] & (o_t < tokens)[None, :]
        b_real = tl.load(flags + o_b[:, None] * tokens + o_t[None, :], mask=here, other=0)
        more = tl.where(o_b < batch, tl.sum((b_real != 0).to(tl.int32), 1), more)
    before = tl.load(counts + o_b, mask=o_b <= batch, other=0)
    tl.store(counts + o_b, before + more, mask=o_b <= batch)
