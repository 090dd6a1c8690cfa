"""Attention of many new tokens, in Triton: a past and the step itself in one online softmax.

A program takes a tile of queries, which are tokens times the query heads of one KV head, and walks the keys that some
query of the tile sees: the sinks and the band of the past, then those of the step. A global head is one whose band
begins at 0 and whose past lies in pages; that of a local head lies in the context's copies. Only the tiles of keys at
an edge are masked. Few queries over many keys are split over the keys and merged.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..plain.attend import merge_stacked
from ..plain.pages import head_index, take_heads
from .configurations import chip_name, configuration, processors
from .pages import INTERPRETING, on_its_device
from .tiles import LOG2E, LOWEST, accumulate, load_rows, sees

# Keys that a part of a split must at least have, for its share of the merge to stay small.
_PART_KEYS = 1024
_MAX_PARTS = 64
# The fastest first, but that cuDNN plans the calls of every new shape for some 40 ms.
_DENSE = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_UNPLANNED = [SDPBackend.FLASH_ATTENTION, *_DENSE]
# From so many tokens on one KV head fills the chip.
_HEAD_ALONE = 4096


@on_its_device
def prefill(query, k_new, v_new, context, rules, *, scale, softcap=None, s_aux=None):
    """Attends new tokens over themselves and over a past; see the plain `prefill` for the arguments."""
    query, k_new, v_new = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, k_new, v_new))
    tokens, every = query.shape[2], tuple(range(rules.heads))
    past = context is not None and context.length > 0
    full = () if past or softcap is not None or s_aux is not None else _seeing_all(rules, tokens)
    if full == every:
        return _dense(query, k_new, v_new, full, rules.heads, scale, _DENSE).contiguous()
    out = query.new_empty(len(query), tokens, query.shape[1], v_new.shape[-1])
    for members, backends in _dense_calls(full, tokens):
        found = _dense(query, k_new, v_new, members, rules.heads, scale, backends).unflatten(2, (len(members), -1))
        out.unflatten(2, (rules.heads, -1)).index_copy_(2, head_index(members, out.device), found)
    arguments = query, k_new, v_new, rules.as_seen, scale, softcap, s_aux, out
    if not past:
        _launch(*arguments, tuple(h for h in every if h not in full))
        return out
    if rules.global_heads:
        _launch(*arguments, rules.global_heads, context.length, context.pages, context.table)
    if rules.stored_heads:
        _launch(*arguments, rules.stored_heads, context.length, *context.laid)
    if rules.local_heads:
        members = tuple(h for _, heads in rules.local_groups for h in heads)
        _launch(*arguments, members, context.length, tuple(map(_one_band, zip(*context.bands))))
    return out


def _seeing_all(rules, tokens):
    """Heads that are as good as global for a step without a past."""
    return tuple(h for h, window in enumerate(rules.window) if min(window, rules.reach) >= tokens)


def _dense_calls(full, tokens):
    """Calls of SDPA for some of the heads. Their shapes must not depend on how many heads that is in a layer."""
    if tokens >= _HEAD_ALONE:
        return [((head,), _DENSE) for head in full]
    return [(full, _UNPLANNED)] if full else []


def _one_band(bands):  # of [batch, heads, rows, dim] -> [batch, rows of all heads, dim]
    flat = [band.flatten(1, 2) for band in bands]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def _dense(query, k_new, v_new, members, heads, scale, backends):
    """Attends the queries of some KV heads by SDPA: `[batch, tokens, query heads of the members, value dim]`."""
    query = take_heads(query.unflatten(1, (heads, -1)), members).flatten(1, 2)
    key, value = take_heads(k_new, members), take_heads(v_new, members)
    if query.element_size() > 2:  # shared heads would take the backend that writes out all scores
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    with sdpa_kernel(backends, set_priority=True) if query.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] > key.shape[1]
        )
    return out.transpose(1, 2)


def _launch(query, k_new, v_new, rules, scale, softcap, s_aux, out, members, length=0, past=None, table=None):
    """Attends the queries of some KV heads into `out`; `past` holds keys and values in pages or in one band."""
    batch, query_heads, tokens, dim = query.shape
    heads, value_dim, device = rules.heads, v_new.shape[-1], query.device
    group = query_heads // heads
    kind, page, table_strides = "local", 0, (0, 0)
    if table is not None:
        kind, page, table_strides = "paged", rules.page_size, table.stride()[:2]
    tile = configuration("prefill", chip_name(device), kind, query.element_size(), max(dim, value_dim), group)
    rows = max(16, min(tile["rows"], triton.next_power_of_2(tokens * group)))
    blocks = triton.cdiv(tokens * group, rows)
    keys = min(length + tokens, max(rules.window[h] for h in members))
    parts = _parts(blocks * len(members) * batch, keys, device)
    target, lse = out, out
    if parts > 1:
        target = torch.empty(parts, batch, tokens, len(members) * group, value_dim, device=device)
        lse = torch.empty(target.shape[:-1], device=device)
    with torch.cuda.device_of(query):
        _prefill_kernel[(blocks, len(members), batch * parts)](
            query, k_new, v_new, *(past or (k_new, v_new)), rules.tensors(device) if table is None else table,
            head_index(members, device), rules.tensors(device), out if s_aux is None else s_aux, target, lse,
            *query.stride()[:3], *k_new.stride()[:3], *v_new.stride()[:3],
            *table_strides, 0 if past is None else past[0].shape[1],
            length, tokens, parts, heads, rules.reach, scale, softcap or 0.0,
            GROUP=group, DIM=dim, VALUE_DIM=value_dim, HAS_PAST=past is not None, PAGE=page, SPLIT=parts > 1,
            SOFTCAP=softcap is not None, HAS_SINK=s_aux is not None, UPCAST=INTERPRETING,
            BLOCK_M=rows, BLOCK_N=tile["keys"], **padded(dim, value_dim, heads), **tile["options"],
        )  # fmt: skip
    if parts > 1:
        found = merge_stacked(target, lse)
        found = found.unflatten(2, (len(members), group)).to(out.dtype)
        out.unflatten(2, (heads, group)).index_copy_(2, head_index(members, device), found)


def padded(dim, value_dim, heads):
    """Sizes of blocks that hold whole head dims and all KV heads."""
    power = triton.next_power_of_2
    return {"BLOCK_D": max(16, power(dim)), "BLOCK_V": max(16, power(value_dim)), "BLOCK_H": power(heads)}


def _parts(programs, keys, device):
    """Parts to split the keys into, where the queries alone are too few to fill the chip."""
    return max(1, min(2 * processors(device) // programs, keys // _PART_KEYS, _MAX_PARTS))


@triton.jit
def _band_start(i_member, heads, bounds, kv_heads, length, BLOCK_H: tl.constexpr):
    """The row of the band of all heads where a head's own begins: behind what the heads before it keep."""
    o_h = tl.arange(0, BLOCK_H)
    before = o_h < i_member
    i_kv = tl.load(heads + o_h, mask=before, other=0)
    window = tl.load(bounds + i_kv, mask=before, other=1)
    sink = tl.load(bounds + kv_heads + i_kv, mask=before, other=0)
    return tl.sum(tl.minimum(sink, length) + tl.minimum(window - 1, length)).to(tl.int64)


@triton.jit
def _page_row(p_table, first, o_n, held, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row of the pool that holds position `first`; for tiles of several pages one for each key, less its `o_n`."""
    if PAGE % BLOCK_N == 0:
        row = tl.load(p_table + first // PAGE).to(tl.int64) * PAGE + first % PAGE
    else:
        page = tl.load(p_table + (first + o_n) // PAGE, mask=held, other=0).to(tl.int64)
        row = page * PAGE + (first + o_n) % PAGE - o_n
    return row


@triton.jit(do_not_specialize=["stride_tb", "stride_th", "past_rows", "length", "tokens", "parts"])
def _prefill_kernel(
    query, k_new, v_new, k_past, v_past, table, heads, bounds, s_aux, out, lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_tb, stride_th, past_rows, length, tokens, parts, kv_heads, reach, scale, softcap,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HAS_PAST: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks of a causal head start first
    i_member, batch = tl.program_id(1), tl.num_programs(2) // parts
    i_part, i_batch = tl.program_id(2) // batch, (tl.program_id(2) % batch).to(tl.int64)
    i_kv = tl.load(heads + i_member)  # int64
    window, sink = tl.load(bounds + i_kv), tl.load(bounds + kv_heads + i_kv)
    o_m, o_n = i_block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o_t, o_head = o_m // GROUP, i_kv * GROUP + o_m % GROUP  # a token's heads lie side by side in the tile
    real, position = o_t < tokens, length + o_t
    p_q = query + i_batch * stride_qb + o_head * stride_qh + o_t.to(tl.int64) * stride_qt
    b_q = load_rows(p_q, real, DIM, BLOCK_D, UPCAST)
    b_max, b_sum = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINK:  # one more logit, with no value behind it
        b_logit = tl.load(s_aux + o_head, mask=real, other=0.0).to(tl.float32) * LOG2E
        b_max, b_sum = tl.where(i_part == 0, b_logit, b_max), tl.where(i_part == 0, b_sum + 1.0, b_sum)
    b_out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    factor = LOG2E if SOFTCAP else scale * LOG2E

    first_query = length + i_block * BLOCK_M // GROUP
    last_query = length + tl.minimum((i_block * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    near = tl.minimum(window, reach)
    sink_stop = tl.minimum(sink, last_query + 1)
    band = tl.maximum(first_query - near + 1, sink_stop)
    for NEW in tl.static_range(0 if HAS_PAST else 1, 2):
        # Positions `low` to `high` are here: a run of the sinks and one of the band, each shifted to its rows.
        if NEW:
            low, high, step_k, step_v = length, last_query + 1, stride_kt, stride_vt
            sink_shift, band_shift = -length, -length
            p_k, p_v = k_new + i_batch * stride_kb + i_kv * stride_kh, v_new + i_batch * stride_vb + i_kv * stride_vh
        else:
            low, high, step_k, step_v = 0, length, DIM, VALUE_DIM
            sink_shift, band_shift = 0, sink - tl.maximum(length - window + 1, 0)
            start = 0
            if not PAGE:
                start = i_batch * past_rows + _band_start(i_member, heads, bounds, kv_heads, length, BLOCK_H)
            p_k, p_v = k_past + start * DIM, v_past + start * VALUE_DIM
        sink_first, band_first = tl.maximum(first_query - reach + 1, low), tl.maximum(band, low)
        if PAGE and not NEW:
            band_first = band_first // BLOCK_N * BLOCK_N  # a tile stays inside its page
        sink_tiles = tl.cdiv(tl.maximum(tl.minimum(sink_stop, high) - sink_first, 0), BLOCK_N)
        tiles = sink_tiles + tl.cdiv(tl.maximum(high - band_first, 0), BLOCK_N)
        for i in range(i_part if SPLIT else 0, tiles, parts if SPLIT else 1):
            in_sink = i < sink_tiles
            first = i * BLOCK_N + tl.where(in_sink, sink_first, band_first - sink_tiles * BLOCK_N)
            stop = tl.where(in_sink, tl.minimum(sink_stop, high), high)
            held = first + o_n < stop
            if PAGE and not NEW:
                row = _page_row(table + i_batch * stride_tb + i_kv * stride_th, first, o_n, held, PAGE, BLOCK_N)
            else:
                row = (first + tl.where(in_sink, sink_shift, band_shift)).to(tl.int64)
            b_k = load_rows(p_k + row * step_k + o_n * step_k, held, DIM, BLOCK_D, UPCAST)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            if SOFTCAP:
                b_s = softcap * (2 * tl.sigmoid(2 * b_s * scale / softcap) - 1)
            whole = (first + BLOCK_N <= stop) & (first + BLOCK_N - 1 <= first_query) & (first > last_query - near)
            if not whole:
                b_s = tl.where(sees(first + o_n, position[:, None], window, sink, reach) & held, b_s, float("-inf"))
            b_v = load_rows(p_v + row * step_v + o_n * step_v, held, VALUE_DIM, BLOCK_V, UPCAST)
            b_out, b_max, b_sum = accumulate(b_s, b_v, b_out, b_max, b_sum, factor)

    b_total = tl.where(b_sum > 0, b_sum, 1.0)
    row = (i_batch * tokens + o_t) * kv_heads * GROUP + o_head
    if SPLIT:
        row = (((i_part * batch + i_batch) * tokens + o_t) * tl.num_programs(1) + i_member) * GROUP + o_m % GROUP
        b_lse = tl.where(b_sum > 0, (b_max + tl.log2(b_total)) / LOG2E, float("-inf"))
        tl.store(lse + row, b_lse, mask=real)
    o_v = tl.arange(0, BLOCK_V)
    b_out = (b_out / b_total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * VALUE_DIM + o_v, b_out, mask=real[:, None] & (o_v < VALUE_DIM))
