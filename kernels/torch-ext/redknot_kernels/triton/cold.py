"""Attention over cold pages as they lie, in Triton.

It makes no dequantised tile. Codes become fp16 four at a time, two instructions a pair. The scales of a page's keys go
into the query (`q . (s * k + z) = (q * s) . k + q . z`), those of its values into the weights. Keys lie channel by
channel and values token by token, each along the dim that its product sums over, so that both go to the tensor cores
as they are read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..plain.cold import Cold
from ..plain.quantise import turned_block
from .pages import INTERPRETING
from .quantise import _TAIL, pools, turned
from .tiles import LOG2E, LOWEST

# Weights are multiplied by so much, so that small ones stay normal in fp16; scales of values are at most 1 there.
_LIFT = tl.constexpr(4096.0)


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


def cold_sizes(stored, tile, dim, page, device, itemsize):
    """What a kernel is compiled for where rows are stored; one tile lies within a page, whose scales it shares."""
    storage = () if stored is None else stored.storage
    wide = itemsize > 2 or INTERPRETING
    sizes = {"COLD": stored is not None, "INT8": 8 in storage, "INT4": 4 in storage, "TURNED": turned_block(dim)}
    ptx = device.type == "cuda" and not torch.version.hip and not wide
    return sizes | {"BLOCK_C": min(tile.get("cold", tile["keys"]), page), "PTX": ptx, "WIDE": wide}


def _fp16_of(part, codes):
    """PTX that makes fp16 of four codes in a register: 0x6400 and a code is 1024 and so much."""
    return tl.constexpr(f"""{{
        .reg .b32 base, part;
        mov.b32 base, 0x64006400;
        {part}
        prmt.b32 $0, {codes}, base, 0x5150;
        prmt.b32 $1, {codes}, base, 0x5352;
        sub.f16x2 $0, $0, base;
        sub.f16x2 $1, $1, base;
        }}""")


_WHOLE = _fp16_of("", "$2")
_LOW = _fp16_of("and.b32 part, $2, 0x0F0F0F0F;", "part")
_HIGH = _fp16_of("shr.u32 part, $2, 4; and.b32 part, part, 0x0F0F0F0F;", "part")


@triton.jit
def _as_fp16(b_byte, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [b_byte], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def _unpacked(b_byte, BITS: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr):
    """Codes of bytes as numbers: of whole bytes, of the low halves, or of the high ones."""
    if PTX:
        if BITS == 8:
            b_x = _as_fp16(b_byte, _WHOLE)
        elif HALF == 0:
            b_x = _as_fp16(b_byte, _LOW)
        else:
            b_x = _as_fp16(b_byte, _HIGH)
    else:
        b_x = b_byte if BITS == 8 else (b_byte >> (4 * HALF)) & 15
        b_x = b_x.to(tl.float32) if WIDE else b_x.to(tl.float16)
    return b_x


@triton.jit
def _product(b_a, b_byte, BITS: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr):
    """`b_a` times codes, of which each row is a column of the product."""
    b_a = b_a if WIDE else b_a.to(tl.float16)
    return tl.dot(b_a, tl.trans(_unpacked(b_byte, BITS, HALF, PTX, WIDE)), input_precision="ieee")


@triton.jit
def _bytes(pointers, mask, MASKED: tl.constexpr):
    return tl.load(pointers, mask=mask, other=0) if MASKED else tl.load(pointers)


@triton.jit
def _key_scales(p_scales, o_k, FIRST: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Scales and zeros of some channels of a page's keys."""
    if COUNT == BLOCK:
        b_scale, b_zero = tl.load(p_scales + FIRST + o_k), tl.load(p_scales + DIM + FIRST + o_k)
    else:
        b_scale = tl.load(p_scales + FIRST + o_k, mask=o_k < COUNT, other=0.0)
        b_zero = tl.load(p_scales + DIM + FIRST + o_k, mask=o_k < COUNT, other=0.0)
    return b_scale, b_zero


@triton.jit
def _value_scales(p_scales, n, PAGE: tl.constexpr):
    """Scales of tokens as shares of a power of two, their zeros, and that power."""
    return tl.load(p_scales + n), tl.load(p_scales + PAGE + n), tl.load(p_scales + 2 * PAGE)


@triton.jit
def attend_cold(
    b_q, codes, scales, signs, p_table, first, stop, p_out, p_lse, asked, scale, softcap,
    BITS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attends queries `[BLOCK_M, BLOCK_D]` over the slots `first` to `stop` of cold pages, and writes the part."""
    HALVES: tl.constexpr = 8 // BITS
    KEYS: tl.constexpr = DIM // HALVES
    VALUES: tl.constexpr = VALUE_DIM // HALVES
    BLOCK_K: tl.constexpr = BLOCK_D if BITS == 8 else max(16, BLOCK_D // 2)
    BLOCK_W: tl.constexpr = BLOCK_V if BITS == 8 else max(16, BLOCK_V // 2)
    CODES: tl.constexpr = PAGE * (DIM + VALUE_DIM) // HALVES
    SCALES: tl.constexpr = 2 * (DIM + PAGE) + _TAIL
    scaling = scale if SOFTCAP else scale * LOG2E
    if BITS == 8:
        b_q0 = b_q.to(tl.float32) * scaling
        b_q1 = b_q0
    else:
        b_q0 = turned(b_q, signs, 0, DIM, 0, KEYS, DIM, TURNED, BLOCK_K) * scaling
        b_q1 = turned(b_q, signs, 0, DIM, KEYS, KEYS, DIM, TURNED, BLOCK_K) * scaling
    o_n, o_k, o_w = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_W)
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    # Summed up slot by slot, and over the slots at the end: a sum over warps in every tile is a wait in every tile.
    b_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_zeros = b_sums
    b_out0 = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    b_out1 = b_out0
    # Scales are read a tile ahead, and the page that they belong to two tiles ahead.
    last = (stop - 1) // PAGE
    p_next = scales + tl.load(p_table + first // PAGE).to(tl.int64) * SCALES
    b_ks, b_kz = _key_scales(p_next, o_k, 0, KEYS, DIM, BLOCK_K)
    b_ks1, b_kz1 = _key_scales(p_next, o_k, DIM - KEYS, KEYS, DIM, BLOCK_K)
    b_vs, b_vz, top = _value_scales(p_next + 2 * DIM, first % PAGE + o_n, PAGE)
    next_page = tl.load(p_table + tl.minimum((first + BLOCK_N) // PAGE, last))
    for start in range(first, stop, BLOCK_N):
        page = tl.load(p_table + start // PAGE).to(tl.int64)
        p_codes, n = codes + page * CODES, start % PAGE + o_n
        b_keys = _bytes(p_codes + n[:, None] * KEYS + o_k[None, :], (o_k < KEYS)[None, :], KEYS < BLOCK_K)
        p_values = p_codes + PAGE * KEYS + o_w[:, None] * PAGE + n[None, :]
        b_values = _bytes(p_values, (o_w < VALUES)[:, None], VALUES < BLOCK_W)
        p_next = scales + next_page.to(tl.int64) * SCALES
        b_ks_next, b_kz_next = _key_scales(p_next, o_k, 0, KEYS, DIM, BLOCK_K)
        b_vs_next, b_vz_next, top_next = _value_scales(p_next + 2 * DIM, (start + BLOCK_N) % PAGE + o_n, PAGE)
        b_bias = tl.sum(b_q0 * b_kz.to(tl.float32)[None, :], 1)
        b_s = _product(b_q0 * b_ks.to(tl.float32)[None, :], b_keys, BITS, 0, PTX, WIDE)
        if BITS == 4:
            b_bias += tl.sum(b_q1 * b_kz1.to(tl.float32)[None, :], 1)
            b_s += _product(b_q1 * b_ks1.to(tl.float32)[None, :], b_keys, BITS, 1, PTX, WIDE)
            b_ks1, b_kz1 = _key_scales(p_next, o_k, KEYS, KEYS, DIM, BLOCK_K)
        next_page = tl.load(p_table + tl.minimum((start + 2 * BLOCK_N) // PAGE, last))
        b_s += b_bias[:, None]
        if SOFTCAP:
            b_s = softcap * (2 * tl.sigmoid(2 * b_s / softcap) - 1) * LOG2E
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_old = tl.exp2(b_max - b_new)
        b_max = b_new
        b_sums = b_sums * b_old[:, None] + b_p
        b_zeros = b_zeros * b_old[:, None] + b_p * b_vz.to(tl.float32)[None, :]
        b_w = b_p * (b_vs.to(tl.float32) * _LIFT)[None, :]
        factor = top.to(tl.float32) / _LIFT
        b_out0 = b_out0 * b_old[:, None] + _product(b_w, b_values, BITS, 0, PTX, WIDE) * factor
        if BITS == 4:
            b_out1 = b_out1 * b_old[:, None] + _product(b_w, b_values, BITS, 1, PTX, WIDE) * factor
        b_ks, b_kz, b_vs, b_vz, top = b_ks_next, b_kz_next, b_vs_next, b_vz_next, top_next
    b_sum, b_zero = tl.where(asked, tl.sum(b_sums, 1), 1.0), tl.sum(b_zeros, 1)
    tl.store(p_lse, b_max + tl.log2(b_sum), mask=asked)
    b_out0 = (b_out0 + b_zero[:, None]) / b_sum[:, None]
    tl.store(p_out[:, None] + o_w, b_out0, mask=asked[:, None] & (o_w < VALUES))
    if BITS == 4:
        b_out1 = (b_out1 + b_zero[:, None]) / b_sum[:, None]
        tl.store(p_out[:, None] + VALUES + o_w, b_out1, mask=asked[:, None] & (o_w < VALUES))
