"""Attention of a text whose pages grow cold while it is read, in Triton: every query sees what its chunk found."""

import triton
import triton.language as tl

from .configurations import chip_name, configuration
from .pages import INTERPRETING, on_its_device
from .prefill import padded
from .tiles import LOG2E, LOWEST, accumulate, load_rows


@on_its_device
def in_chunks(query, key, value, cold, places, ends, page_size, *, scale, softcap=None, s_aux=None):
    """Attends some queries of a text over its first page, over pages that went through bits, and over what is hot.

    Args:
        query: `[batch, query heads, rows, dim]`.
        key, value: Of the whole text, `[batch, KV heads, tokens, dim]`.
        cold: Keys and values as cold pages give them back, of the same shapes.
        places: `[rows]` of int32, ascending: where the queries stand.
        ends: `[rows]` of int32, never falling: where for each query the cold pages end, the first page's end or more.
        page_size: Tokens of a page.
        scale, softcap: Of the scores.
        s_aux: `[query heads]`, one more logit in each head's softmax.

    Returns:
        `[batch, rows, query heads, value dim]`, contiguous.
    """
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, *cold)]
    query, key, value, *_ = tensors
    batch, query_heads, rows, dim = query.shape
    heads, value_dim = key.shape[1], value.shape[-1]
    group = query_heads // heads
    tile = configuration(
        "prefill", chip_name(query.device), "chunks", query.element_size(), max(dim, value_dim), group
    )
    block = max(16, min(tile["rows"], triton.next_power_of_2(rows * group)))
    blocks = padded(dim, value_dim, heads)
    out = query.new_empty(batch, rows, query_heads, value_dim)
    _in_chunks_kernel[(triton.cdiv(rows * group, block), heads, batch)](
        *tensors, places, ends, out if s_aux is None else s_aux, out, *(n for x in tensors for n in x.stride()[:3]),
        rows, scale, softcap or 0.0,
        GROUP=group, DIM=dim, VALUE_DIM=value_dim, PAGE=page_size, SOFTCAP=softcap is not None,
        HAS_SINK=s_aux is not None, UPCAST=INTERPRETING, BLOCK_M=block, BLOCK_N=max(16, min(tile["keys"], page_size)),
        BLOCK_D=blocks["BLOCK_D"], BLOCK_V=blocks["BLOCK_V"], **tile["options"],
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _in_chunks_kernel(
    query, key, value, key_cold, value_cold, places, ends, s_aux, out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ckb, stride_ckh, stride_ckt, stride_cvb, stride_cvh, stride_cvt, rows, scale, softcap,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_SINK: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks start first
    i_kv, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m, o_n = i_block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o_t, o_head = o_m // GROUP, i_kv * GROUP + o_m % GROUP  # a token's heads lie side by side in the tile
    real = o_t < rows
    first_row, last_row = i_block * BLOCK_M // GROUP, tl.minimum((i_block * BLOCK_M + BLOCK_M - 1) // GROUP, rows - 1)
    first_query, last_query = tl.load(places + first_row), tl.load(places + last_row)
    first_end, last_end = tl.load(ends + first_row), tl.load(ends + last_row)
    place, end = tl.load(places + o_t, mask=real, other=0), tl.load(ends + o_t, mask=real, other=0)
    p_q = query + i_batch * stride_qb + o_head * stride_qh + o_t.to(tl.int64) * stride_qt
    b_q = load_rows(p_q, real, DIM, BLOCK_D, UPCAST)
    b_max, b_sum = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINK:  # one more logit, with no value behind it
        b_max = tl.load(s_aux + o_head, mask=real, other=0.0).to(tl.float32) * LOG2E
        b_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    factor = LOG2E if SOFTCAP else scale * LOG2E

    for COLD in tl.static_range(2):  # what the model made: the first page, and what is hot for some query; cold pages
        if COLD:
            first_stop, low, high, step_k, step_v = 0, PAGE, last_end, stride_ckt, stride_cvt
            p_k = key_cold + i_batch * stride_ckb + i_kv * stride_ckh
            p_v = value_cold + i_batch * stride_cvb + i_kv * stride_cvh
        else:
            low, high, step_k, step_v = first_end, last_query + 1, stride_kt, stride_vt
            first_stop = tl.minimum(PAGE, high)
            p_k, p_v = key + i_batch * stride_kb + i_kv * stride_kh, value + i_batch * stride_vb + i_kv * stride_vh
        first_tiles = tl.cdiv(first_stop, BLOCK_N)
        tiles = first_tiles + tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
        for i in range(tiles):
            in_first = i < first_tiles
            first = i * BLOCK_N + tl.where(in_first, 0, low - first_tiles * BLOCK_N)
            held = first + o_n < tl.where(in_first, first_stop, high)
            row = tl.cast(first, tl.int64)
            b_k = load_rows(p_k + (row + o_n) * step_k, held, DIM, BLOCK_D, UPCAST)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            if SOFTCAP:
                b_s = softcap * (2 * tl.sigmoid(2 * b_s * scale / softcap) - 1)
            if COLD:
                whole = first + BLOCK_N <= first_end
                seen = first + o_n < end[:, None]
            else:
                whole = first + BLOCK_N - 1 <= first_query
                whole = whole & tl.where(in_first, first + BLOCK_N <= PAGE, first >= last_end)
                seen = (first + o_n <= place[:, None]) & ((first + o_n >= end[:, None]) | in_first)
            if not whole:  # at an edge, or cold for some queries and hot for others
                b_s = tl.where(seen & held, b_s, float("-inf"))
            b_v = load_rows(p_v + (row + o_n) * step_v, held, VALUE_DIM, BLOCK_V, UPCAST)
            b_out, b_max, b_sum = accumulate(b_s, b_v, b_out, b_max, b_sum, factor)

    o_v = tl.arange(0, BLOCK_V)
    row = (i_batch * rows + o_t) * tl.num_programs(1) * GROUP + o_head
    b_out = (b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * VALUE_DIM + o_v, b_out, mask=real[:, None] & (o_v < VALUE_DIM))
