"""Attention of tokens at any places of a text, in Triton: one launch for all heads.

A program takes a tile of queries, tokens times the query heads of one KV head, and walks what the tile's queries see:
the sinks, and the band from the first query's window to the last query.
"""

import triton
import triton.language as tl

from .configurations import chip_name, configuration
from .pages import INTERPRETING, on_its_device
from .tiles import LOG2E, LOWEST, accumulate, load_rows, sees


@on_its_device
def attend_at(query, keys, values, positions, rules, *, scale, softcap=None, s_aux=None):
    """Attends some tokens of a text over what stands before them; see the plain `attend_at` for the arguments."""
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    batch, query_heads, tokens, dim = query.shape
    heads, value_dim, device, power = rules.heads, values.shape[-1], query.device, triton.next_power_of_2
    group = query_heads // heads
    tile = configuration("prefill", chip_name(device), "text", query.element_size(), max(dim, value_dim), group)
    rows = max(16, min(tile["rows"], power(tokens * group)))
    out = query.new_empty(batch, tokens, query_heads, value_dim)
    _attend_at_kernel[(triton.cdiv(tokens * group, rows), heads, batch)](
        query, keys, values, positions, rules.tensors(device), out if s_aux is None else s_aux, out,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        tokens, heads, rules.reach, scale, softcap or 0.0,
        GROUP=group, DIM=dim, VALUE_DIM=value_dim, SOFTCAP=softcap is not None, HAS_SINK=s_aux is not None,
        UPCAST=INTERPRETING, BLOCK_M=rows, BLOCK_N=tile["keys"], BLOCK_D=max(16, power(dim)),
        BLOCK_V=max(16, power(value_dim)), **tile["options"],
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _attend_at_kernel(
    query, keys, values, positions, bounds, s_aux, out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    tokens, kv_heads, reach, scale, softcap,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks of a causal head start first
    i_kv, i_batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    window, sink = tl.load(bounds + i_kv), tl.load(bounds + kv_heads + i_kv)
    o_m, o_n = i_block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o_t, o_head = o_m // GROUP, i_kv * GROUP + o_m % GROUP  # a token's heads lie side by side in the tile
    real = o_t < tokens
    position = tl.load(positions + o_t, mask=real, other=0).to(tl.int32)
    last_query = tl.max(position, 0)
    first_query = tl.min(tl.where(real, position, last_query), 0)
    p_q = query + i_batch * stride_qb + o_head * stride_qh + o_t.to(tl.int64) * stride_qt
    b_q = load_rows(p_q, real, DIM, BLOCK_D, UPCAST)
    b_max, b_sum = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINK:  # one more logit, with no value behind it
        b_max = tl.load(s_aux + o_head, mask=real, other=0.0).to(tl.float32) * LOG2E
        b_sum += 1.0
    b_out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    factor = LOG2E if SOFTCAP else scale * LOG2E
    near, stop = tl.minimum(window, reach), last_query + 1
    sink_stop = tl.minimum(sink, stop)
    sink_first = tl.maximum(first_query - reach + 1, 0)
    band = tl.maximum(first_query - near + 1, sink_stop)
    sink_tiles = tl.cdiv(tl.maximum(sink_stop - sink_first, 0), BLOCK_N)
    p_k, p_v = keys + i_batch * stride_kb + i_kv * stride_kh, values + i_batch * stride_vb + i_kv * stride_vh
    for i in range(sink_tiles + tl.cdiv(tl.maximum(stop - band, 0), BLOCK_N)):
        in_sink = i < sink_tiles
        first = i * BLOCK_N + tl.where(in_sink, sink_first, band - sink_tiles * BLOCK_N)
        end = tl.where(in_sink, sink_stop, stop)
        held, row = first + o_n < end, (first + o_n).to(tl.int64)
        b_k = load_rows(p_k + row * stride_kt, held, DIM, BLOCK_D, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if SOFTCAP:
            b_s = softcap * (2 * tl.sigmoid(2 * b_s * scale / softcap) - 1)
        if (first + BLOCK_N > end) | (first + BLOCK_N - 1 > first_query) | (first <= last_query - near):
            b_s = tl.where(sees(first + o_n, position[:, None], window, sink, reach) & held, b_s, float("-inf"))
        b_v = load_rows(p_v + row * stride_vt, held, VALUE_DIM, BLOCK_V, UPCAST)
        b_out, b_max, b_sum = accumulate(b_s, b_v, b_out, b_max, b_sum, factor)
    o_v = tl.arange(0, BLOCK_V)
    b_out = (b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]).to(out.dtype.element_ty)
    p_out = out + ((i_batch * tokens + o_t) * kv_heads * GROUP + o_head)[:, None] * VALUE_DIM + o_v
    tl.store(p_out, b_out, mask=real[:, None] & (o_v < VALUE_DIM))
