"""Attention over cold pages as they lie, in Triton.

It makes no dequantised tile. The scales of a page's keys go into the query (`q . (s * k + z) = (q * s) . k + q . z`),
those of its values into the weights. Keys lie channel by channel and values token by token, each along the dim that
its product sums over, so that tensor cores take both as they are read. Every warp attends tokens of its own, and they
come together last: until then none waits for another.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..plain.cold import Cold
from ..plain.quantise import turned_block
from .quantise import _TAIL, pools, turned
from .tiles import LOG2E, LOWEST
from .words import in_order, numbers, of_warps, order_of, read_keys, read_scales, read_values, scales_of

# The query rows of a program at most, and the tokens that a warp takes at once, in half and in single precision.
MOST_ROWS = 16
_TOKENS = 32, 16
# Weights are two to so much at most, so that small ones stay normal in fp16; scales of values are at most 1 there.
_LIFT = tl.constexpr(14.0)
# Queries are multiplied by so much, so that products with the scales of keys stay finite in fp16.
_QUERY = tl.constexpr(0.0625)
# The least fp16 above zero, of which codes are so many times, and one in both halves of a word.
_LEAST, _ONES = tl.constexpr(2.0**-24), tl.constexpr(0x3C003C00)


class Stored(NamedTuple):
    """The stored rows of a launch: `Cold`, the bits of every head's cold pages, and the length of the hot tails."""

    cold: Cold
    storage: tuple
    hot: int


def stored_rows(cold, rules):
    """What a launch is told of cold pages."""
    return None if cold is None else Stored(cold, rules.storage, rules.hot)


def cold_tensors(stored, pages, counts):
    """Pools, table and counts of cold pages; where there are none, something that is not read."""
    if stored is None:
        return *pages, *pages, counts, counts, counts
    return *pools(stored.cold, pages), stored.cold.table, stored.cold.counts


def cold_strides(stored):
    """Strides of the table of cold pages."""
    return (0, 0) if stored is None else stored.cold.table.stride()[:2]


def cold_sizes(stored, tile, dim, page, device, itemsize, rows):
    """What a kernel is compiled for where rows are stored; `rows` are a head's queries, tokens times its group.

    The tokens that a warp takes lie within a page.
    """
    storage, wide = () if stored is None else stored.storage, itemsize > 2
    few = 8 if stored is not None and rows <= 8 else MOST_ROWS  # one for all, where no row is read so
    sizes = {"COLD": stored is not None, "INT8": 8 in storage, "INT4": 4 in storage, "TURNED": turned_block(dim)}
    ptx = device.type == "cuda" and not torch.version.hip
    sizes |= {"BLOCK_C": min(tile.get("cold", _TOKENS[wide]), page), "FEW": few}
    return sizes | {"WARPS": tile["options"]["num_warps"], "PTX": ptx, "WIDE": wide}


@triton.jit
def pages_at(p_table, start, last, o_w, PAGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """The page of every warp where a turn begins at a slot, and which part of it; none is behind the last page."""
    COUNT: tl.constexpr = max(1, o_w.shape[0] * BLOCK_C // PAGE)
    b_page = tl.load(p_table + tl.minimum(start // PAGE, last)) + o_w * 0
    for i in tl.static_range(1, COUNT):
        page = tl.load(p_table + tl.minimum(start // PAGE + i, last))
        b_page = tl.where(o_w * BLOCK_C // PAGE == i, page, b_page)
    return b_page.to(tl.int64), start % PAGE // BLOCK_C + o_w % (PAGE // BLOCK_C)


@triton.jit
def _scaled(b_x, b_scale):
    """`[warps, rows, summed]` times scales `[warps, 8, summed]`, whose rows are alike."""
    b_y = tl.reshape(b_x, b_x.shape[0], b_x.shape[1] // 8, 8, b_x.shape[2]) * b_scale[:, None]
    return tl.reshape(b_y, b_x.shape[0], b_x.shape[1], b_x.shape[2])


@triton.jit
def _dot(b_a, b_b, b_sum):
    """Adds the products of the rows of both in every warp; Triton 3.6 makes some wrong of float32 in three tf32."""
    return tl.dot(b_a, tl.permute(b_b, 0, 2, 1), b_sum, input_precision="ieee")


@triton.jit
def _queries(
    p_q, stride_d, signs, asked, BITS: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, WORDS: tl.constexpr, WARPS: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Queries `[warps, rows, summed]`; in 4 bits of the low half of the turned dim, and a sixteenth of the high."""
    NUMBER: tl.constexpr = tl.float32 if WIDE else tl.float16
    o_k, o_d = order_of(BLOCK_K, WORDS), tl.arange(0, BLOCK_D)
    if BITS == 8:
        b_0 = tl.load(p_q[:, None] + o_k * stride_d, mask=asked[:, None] & (o_k < DIM), other=0.0).to(tl.float32)
        b_1 = b_0
    elif TURNED == DIM and 2 * BLOCK_K == DIM:  # both halves of the dim turn alike: their sum, and their difference
        o_h = tl.arange(0, BLOCK_K)
        b_low = tl.load(p_q[:, None] + o_h * stride_d, mask=asked[:, None], other=0.0)
        b_high = tl.load(p_q[:, None] + (BLOCK_K + o_h) * stride_d, mask=asked[:, None], other=0.0)
        b_q = tl.reshape(tl.permute(tl.join(b_low, b_high), 0, 2, 1), 2 * p_q.shape[0], BLOCK_K)
        b_q = turned(b_q if PTX else b_q.to(tl.float32), signs, o_k, 0, BLOCK_K, 0, BLOCK_K, DIM, TURNED)
        b_low, b_high = tl.split(tl.permute(tl.reshape(b_q, p_q.shape[0], 2, BLOCK_K), 0, 2, 1))
        b_0, b_1 = b_low + b_high, (b_low - b_high) * (1 / 16)
    else:
        b_q = tl.load(p_q[:, None] + o_d * stride_d, mask=asked[:, None] & (o_d < DIM), other=0.0)
        b_q = b_q if PTX else b_q.to(tl.float32)
        b_0 = turned(b_q, signs, o_k, 0, DIM, 0, DIM // 2, DIM, TURNED)
        b_1 = turned(b_q, signs, o_k, 0, DIM, DIM // 2, DIM // 2, DIM, TURNED) * (1 / 16)
    b_0 = tl.broadcast_to((b_0 * _QUERY).to(NUMBER)[None], WARPS, p_q.shape[0], BLOCK_K)
    return b_0, tl.broadcast_to((b_1 * _QUERY).to(NUMBER)[None], WARPS, p_q.shape[0], BLOCK_K)


@triton.jit
def attend_cold(
    p_q, stride_qd, codes, scales, signs, p_table, b_page, b_part, first, stop, p_out, p_lse, asked, scale, softcap,
    BITS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, WARPS: tl.constexpr, SOFTCAP: tl.constexpr,
    PTX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attends queries, at 8 or 16 pointers, over the slots `first` to `stop` of cold pages, and writes the part.

    `b_page` and `b_part` are those of the first turn, which are on their way while queries are made ready.
    """
    HALVES: tl.constexpr = 8 // BITS
    KEYS: tl.constexpr = DIM // HALVES
    VALUES: tl.constexpr = VALUE_DIM // HALVES
    BLOCK_K: tl.constexpr = BLOCK_D if BITS == 8 else max(16, BLOCK_D // 2)
    BLOCK_W: tl.constexpr = BLOCK_V if BITS == 8 else max(16, BLOCK_V // 2)
    CODES: tl.constexpr = PAGE * (DIM + VALUE_DIM) // HALVES
    SCALES: tl.constexpr = 2 * (DIM + PAGE) + _TAIL
    UNIT: tl.constexpr = _LEAST if PTX else 1.0  # of a code
    WORDS: tl.constexpr = min(4, BLOCK_K // 16)
    TOKENS: tl.constexpr = BLOCK_C // 16
    ROWS: tl.constexpr = p_q.shape[0]
    NUMBER: tl.constexpr = tl.float32 if WIDE else tl.float16
    b_q0, b_q1 = _queries(p_q, stride_qd, signs, asked, BITS, DIM, TURNED, BLOCK_D, BLOCK_K, WORDS, WARPS, PTX, WIDE)
    o_w, o_r, o_v = tl.arange(0, WARPS), tl.arange(0, 8), tl.arange(0, BLOCK_W)
    b_max = tl.full([WARPS, ROWS], LOWEST, tl.float32)
    b_none = tl.zeros([WARPS, ROWS, 8], tl.float32)
    b_sums = b_none
    b_out0 = tl.zeros([WARPS, BLOCK_W, ROWS], tl.float32)
    b_out1 = b_out0
    b_top = tl.full([WARPS], 1.0, tl.float32)
    factor = scale * (1 / _QUERY) if SOFTCAP else scale * (LOG2E / _QUERY)
    last = (stop - 1) // PAGE
    for start in tl.range(first, stop, WARPS * BLOCK_C, num_stages=1):
        p_codes, p_scales = codes + of_warps(b_page * CODES), scales + of_warps(b_page * SCALES)
        b_keys = read_keys(p_codes, b_part, KEYS, BLOCK_K, BLOCK_C)
        b_values = read_values(p_codes + PAGE * KEYS, b_part, VALUES, BLOCK_W, BLOCK_C, PAGE)
        b_scale = scales_of(read_scales(p_scales, o_w * 0, 0, KEYS, BLOCK_K, WORDS), WIDE)
        b_zero = scales_of(read_scales(p_scales, o_w * 0, HALVES, KEYS, BLOCK_K, WORDS), WIDE)
        p_tokens, b_first = p_scales + 2 * DIM, b_part * (BLOCK_C // 2)
        b_share = scales_of(read_scales(p_tokens, b_first, 0, PAGE, BLOCK_C, TOKENS), WIDE)
        b_zeros = read_scales(p_tokens, b_first, 1, PAGE, BLOCK_C, TOKENS)
        b_above = tl.load(scales + b_page * SCALES + 2 * (DIM + PAGE)).to(tl.float32)
        b_page, b_part = pages_at(p_table, start + WARPS * BLOCK_C, last, o_w, PAGE, BLOCK_C)
        b_bias = b_none
        b_s = tl.zeros([WARPS, ROWS, BLOCK_C], tl.float32)
        if BITS == 4:
            b_scale1 = scales_of(read_scales(p_scales, o_w * 0, 1, KEYS, BLOCK_K, WORDS), WIDE)
            b_zero1 = scales_of(read_scales(p_scales, o_w * 0, 3, KEYS, BLOCK_K, WORDS), WIDE)
            b_bias = _dot(b_q1, b_zero1, b_none) * 16
            b_s = _dot(_scaled(b_q1, b_scale1), numbers(b_keys, BITS, 1, PTX, WIDE), b_s)
        b_s = _dot(_scaled(b_q0, b_scale), numbers(b_keys, BITS, 0, PTX, WIDE), b_s)
        b_bias = tl.max(_dot(b_q0, b_zero, b_bias), 2) * factor  # of 8 alike ones
        held = (start + o_w * BLOCK_C < stop)[:, None]
        if SOFTCAP:
            b_s = 2 * tl.sigmoid(2 * (b_s * (factor / UNIT) + b_bias[:, :, None]) / softcap) - 1
            b_s, b_bias, above = b_s * softcap, tl.zeros([WARPS, ROWS], tl.float32), LOG2E
        else:
            above = factor / UNIT
        b_bias = tl.where(held, b_bias, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 2) * above + b_bias)
        b_p = in_order(tl.exp2(b_s * above - (b_new - b_bias - _LIFT)[:, :, None]).to(NUMBER))
        b_old = tl.exp2(b_max - b_new)
        b_max = b_new
        # Beside the zeros of values stand ones, so that the product is sums of zeros and of weights.
        b_zeros = scales_of(tl.where((o_r == 0)[None, :, None, None, None, None], b_zeros, _ONES), WIDE)
        b_sums = _dot(b_p, b_zeros, b_sums * b_old[:, :, None])
        b_p, b_less = _scaled(b_p, b_share), (b_old * (b_top / b_above)[:, None])[:, None, :]
        b_top = b_above
        b_out0 = _dot(numbers(b_values, BITS, 0, PTX, WIDE), b_p, b_out0 * b_less)
        if BITS == 4:
            b_out1 = _dot(numbers(b_values, BITS, 1, PTX, WIDE), b_p, b_out1 * b_less)
    most = tl.max(b_max, 0)
    b_weight = tl.exp2(b_max - most[None])
    b_sums = tl.sum(b_sums * b_weight[:, :, None], 0)
    b_zero = tl.sum(tl.where(o_r == 0, b_sums, 0.0), 1)
    b_sum = tl.where(asked, tl.sum(tl.where(o_r == 1, b_sums, 0.0), 1), 1.0)
    tl.store(p_lse, most - _LIFT + tl.log2(b_sum), mask=asked)
    b_weight = (b_weight * b_top[:, None])[:, None, :] * (1 / UNIT)
    p_out, asked = p_out + o_v[:, None], asked & (o_v < VALUES)[:, None]
    tl.store(p_out, (tl.sum(b_out0 * b_weight, 0) + b_zero) / b_sum, mask=asked)
    if BITS == 4:
        tl.store(p_out + VALUES, (tl.sum(b_out1 * b_weight, 0) * (1 / 16) + b_zero) / b_sum, mask=asked)
