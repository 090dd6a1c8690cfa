"""Reading cold pages back, in Triton: what a long step attends as its past."""

import torch
import triton
import triton.language as tl

from ..plain.pages import Pages
from .pages import INTERPRETING, on_its_device
from .quantise import _TAIL, pools, sizes_of, turned


@on_its_device
def lay_out(pages, cold, table, length, rules):
    """The past of stored rows as a long step reads it; see the plain `lay_out` for the arguments."""
    size, columns, stored = rules.page_size, triton.cdiv(length, rules.page_size), len(rules.stored_heads)
    batch, heads, _ = table.shape
    laid = Pages(*(x.new_empty(batch * stored * columns, size, x.shape[-1]) for x in pages))
    rows = torch.zeros(batch, heads, columns, dtype=torch.int32, device=table.device)
    numbers = torch.arange(len(laid.keys), dtype=torch.int32, device=table.device)
    rows[:, list(rules.stored_heads)] = numbers.view(batch, stored, columns)
    sizes = sizes_of(pages)
    wide = max(sizes["BLOCK_D"], sizes["BLOCK_V"]) * sizes["PAGE"]
    _lay_out_kernel[(columns, heads, batch)](
        *pages, *laid, table, rows, rules.tensors(table.device), *pools(cold, pages), cold.table, cold.counts,
        *pages.keys.stride()[:2], *pages.values.stride()[:2], *table.stride()[:2], *cold.table.stride()[:2],
        heads, columns, length, **sizes, INT8=8 in rules.storage, INT4=4 in rules.storage, UPCAST=INTERPRETING,
        num_warps=8 if wide > 8192 else 4,
    )  # fmt: skip
    return laid, rows


@triton.jit
def _thaw(p_codes, p_scales, signs, p_k, p_v, o_n, BITS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
          PAGE: tl.constexpr, TURNED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Dequantises one page into a plain one."""
    HALVES: tl.constexpr = 8 // BITS
    COUNT: tl.constexpr = DIM // HALVES
    BLOCK: tl.constexpr = BLOCK_D if BITS == 8 else max(16, BLOCK_D // 2)
    VALUES: tl.constexpr = VALUE_DIM // HALVES
    BLOCK_W: tl.constexpr = BLOCK_V if BITS == 8 else max(16, BLOCK_V // 2)
    o_c, o_d, o_w = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_W)
    b_byte = tl.load(p_codes + o_n[:, None] * COUNT + o_c[None, :], mask=(o_c < COUNT)[None, :], other=0)
    b_k = tl.zeros([PAGE, BLOCK_D], tl.float32)
    for HALF in tl.static_range(HALVES):
        b_scale = tl.load(p_scales + HALF * COUNT + o_c, mask=o_c < COUNT, other=0.0).to(tl.float32)
        b_zero = tl.load(p_scales + DIM + HALF * COUNT + o_c, mask=o_c < COUNT, other=0.0).to(tl.float32)
        b_codes = b_byte if BITS == 8 else (b_byte >> (4 * HALF)) & 15
        b_x = b_codes.to(tl.float32) * b_scale[None, :] + b_zero[None, :]
        if BITS == 8:
            b_k = b_x
        else:
            b_k += turned(b_x, signs, o_d, HALF * COUNT, COUNT, 0, DIM, DIM, TURNED)
    tl.store(p_k + o_n[:, None] * DIM + o_d[None, :], b_k.to(p_k.dtype.element_ty), mask=(o_d < DIM)[None, :])
    p_codes += PAGE * COUNT
    b_byte = tl.load(p_codes + o_w[None, :] * PAGE + o_n[:, None], mask=(o_w < VALUES)[None, :], other=0)
    top = tl.load(p_scales + 2 * (DIM + PAGE)).to(tl.float32)
    b_step = tl.load(p_scales + 2 * DIM + o_n).to(tl.float32) * top
    b_zero = tl.load(p_scales + 2 * DIM + PAGE + o_n).to(tl.float32)
    for HALF in tl.static_range(HALVES):
        b_codes = b_byte if BITS == 8 else (b_byte >> (4 * HALF)) & 15
        b_v = (b_codes.to(tl.float32) * b_step[:, None] + b_zero[:, None]).to(p_v.dtype.element_ty)
        tl.store(p_v + o_n[:, None] * VALUE_DIM + HALF * VALUES + o_w[None, :], b_v, mask=(o_w < VALUES)[None, :])


@triton.jit(do_not_specialize=["stride_tb", "stride_th", "stride_cb", "stride_ch", "columns", "length"])
def _lay_out_kernel(
    k_pages, v_pages, k_laid, v_laid, table, rows, bounds, codes8, scales8, codes4, scales4, signs,
    cold_table, cold_counts, stride_kp, stride_ks, stride_vp, stride_vs, stride_tb, stride_th, stride_cb, stride_ch,
    heads, columns, length,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, INT8: tl.constexpr, INT4: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_column, i_head, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    bits = tl.load(bounds + 3 * heads + i_head)
    if bits == 0:
        return
    count = tl.load(cold_counts + i_batch * heads + i_head)
    to = tl.load(rows + (i_batch * heads + i_head) * columns + i_column).to(tl.int64)
    p_k, p_v = k_laid + to * PAGE * DIM, v_laid + to * PAGE * VALUE_DIM
    o_n, o_d, o_v = tl.arange(0, PAGE), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    if (i_column == 0) | (i_column > count):
        pages_in_ring = tl.load(bounds + 2 * heads + i_head) // PAGE
        column = tl.where(i_column == 0, 0, 1 + (i_column - 1) % pages_in_ring)
        page = tl.load(table + i_batch * stride_tb + i_head * stride_th + column).to(tl.int64)
        held = (i_column * PAGE + o_n < length)[:, None]
        p_from = (k_pages + page * stride_kp + o_n * stride_ks)[:, None] + o_d
        b_x = tl.load(p_from, mask=held & (o_d < DIM), other=0.0)
        tl.store(p_k + o_n[:, None] * DIM + o_d[None, :], b_x, mask=(o_d < DIM)[None, :])
        p_from = (v_pages + page * stride_vp + o_n * stride_vs)[:, None] + o_v
        b_x = tl.load(p_from, mask=held & (o_v < VALUE_DIM), other=0.0)
        tl.store(p_v + o_n[:, None] * VALUE_DIM + o_v[None, :], b_x, mask=(o_v < VALUE_DIM)[None, :])
    else:
        page = tl.load(cold_table + i_batch * stride_cb + i_head * stride_ch + i_column - 1).to(tl.int64)
        CODES: tl.constexpr = PAGE * (DIM + VALUE_DIM)
        scale = page * (2 * (DIM + PAGE) + _TAIL)
        if INT8:  # noqa: SIM102 - a constant, and the other is not
            if bits == 8:
                _thaw(codes8 + page * CODES, scales8 + scale, signs, p_k, p_v, o_n, 8, DIM, VALUE_DIM, PAGE, TURNED,
                      BLOCK_D, BLOCK_V)  # fmt: skip
        if INT4:  # noqa: SIM102
            if bits == 4:
                _thaw(codes4 + page * (CODES // 2), scales4 + scale, signs, p_k, p_v, o_n, 4, DIM, VALUE_DIM, PAGE,
                      TURNED, BLOCK_D, BLOCK_V)  # fmt: skip
