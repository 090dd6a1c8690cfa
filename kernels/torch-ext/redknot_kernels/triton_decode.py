"""Attention of a few new tokens over pages, in Triton: split over the keys of every row, then merged.

A program takes one split of one row and the query heads of its group. Rows get as many programs as their head may keep
splits, and those beyond a row's end leave at once, so that a long row among short ones still fills the chip. Lengths
and tables are read on the device: a launch can be captured.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .triton_pages import INTERPRETING, await_previous, check_device, early_launch

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)  # a maximum to start from that is finite, so that differences are never NaN

# Programs that a multiprocessor runs at a time, and about the fewest and the most slots of a split: long ones leave
# the chip idle where one row is longer than the others.
_PROGRAMS = 3
_MIN_SPLIT = 64
_MAX_SPLIT = 2048
# The most splits a program merges at once, and with them as many value channels: a merge is a matter of latency.
_MERGED = 256, 16
# Bytes of keys and values of a stage, and of all stages in flight.
_STAGE_BYTES = 32 << 10
_FLIGHT_BYTES = 64 << 10


def decode(query, k_pages, v_pages, table, lengths, rules, *, scale, softcap=None, s_aux=None):
    """Attends the last tokens of every row over the whole row; see the plain `decode` for the arguments."""
    check_device(query)
    batch, query_heads, tokens, dim = query.shape
    heads, value_dim = rules.heads, v_pages.shape[-1]
    group, slots = query_heads // heads, table.shape[2] * rules.page_size
    block_d, block_v = (max(16, triton.next_power_of_2(d)) for d in (dim, value_dim))
    block_n, stages, warps = _tile((block_d + block_v) * k_pages.element_size())
    split, programs = _work(rules, batch, slots, block_n, query.device)
    bounds = rules.tensors(query.device)
    out = query.new_empty(batch, tokens, query_heads, value_dim)
    part_out = torch.empty(batch, programs, group * tokens, value_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(batch, programs, group * tokens, dtype=torch.float32, device=query.device)
    sizes = {"GROUP": group, "TOKENS": tokens, "VALUE_DIM": value_dim, "BLOCK_H": triton.next_power_of_2(heads)}
    _split_kernel[(programs, batch)](
        query, k_pages, v_pages, table, lengths, bounds, part_out, part_lse,
        *query.stride(), *k_pages.stride()[:2], *v_pages.stride()[:2], *table.stride()[:2],
        scale, softcap or 0.0, rules.reach, heads, slots, split,
        **sizes, DIM=dim, PAGE=rules.page_size, BLOCK_M=triton.next_power_of_2(max(16, group * tokens)),
        BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_V=block_v, SOFTCAP=softcap is not None, UPCAST=INTERPRETING,
        num_warps=warps, num_stages=stages, **early_launch(query.device),
    )  # fmt: skip
    block_s = min(triton.next_power_of_2(-(-slots // split)), _MERGED[0])
    block_v = min(block_v, _MERGED[0] * _MERGED[1] // block_s)
    _merge_kernel[(tokens * group * triton.cdiv(value_dim, block_v), heads, batch)](
        part_out, part_lse, lengths, bounds, out if s_aux is None else s_aux, out, heads, slots, split, programs,
        **sizes, BLOCK_S=block_s, BLOCK_V=block_v, HAS_SINK=s_aux is not None,
        num_warps=4, **early_launch(query.device),
    )  # fmt: skip
    return out


def _tile(slot_bytes):
    """Slots of a block, stages and warps, for the bytes of a slot's key and value."""
    block = min(64, max(16, triton.next_power_of_2(_STAGE_BYTES // slot_bytes + 1) // 2))
    return block, 1 + max(1, min(3, _FLIGHT_BYTES // (block * slot_bytes))), 4


@lru_cache(maxsize=1024)
def _work(rules, batch, slots, block, device):
    """Slots of a split and programs of a sequence: whole waves of them, where all rows are as long as they may be."""
    kept = [min(slots, sink + ring) for sink, ring in zip(rules.sink, rules.ring)]
    total, wave = batch * sum(kept), _PROGRAMS * _processors(device)  # of programs that run at a time
    waves = max(1, -(-total // (wave * _MAX_SPLIT)))
    parts = max(1, waves * wave * max(kept) // max(1, total))
    split = max(-(-max(kept) // parts), _MIN_SPLIT)
    split = -(-split // block) * block
    return split, max(1, sum(-(-k // split) for k in kept))


@lru_cache(maxsize=64)
def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _splits(bounds, heads, slots, split, BLOCK_H: tl.constexpr):
    """Splits that a row of each head may have."""
    o_h = tl.arange(0, BLOCK_H)
    sink = tl.load(bounds + heads + o_h, mask=o_h < heads, other=0)
    ring = tl.load(bounds + 2 * heads + o_h, mask=o_h < heads, other=0)
    return tl.cdiv(tl.minimum(sink + ring, slots), split)


@triton.jit
def _load(p_rows, held, DIM: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):  # [rows] -> [rows, BLOCK]
    o_d = tl.arange(0, BLOCK)
    mask = held[:, None] if DIM == BLOCK else held[:, None] & (o_d < DIM)
    block = tl.load(p_rows[:, None] + o_d, mask=mask, other=0.0)
    return block.to(tl.float32) if UPCAST else block  # the interpreter computes nothing right in bfloat16


@triton.jit
def _split_kernel(
    q, k_pages, v_pages, table, lengths, bounds, part_out, part_lse,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kp, stride_ks, stride_vp, stride_vs, stride_tb, stride_th,
    scale, softcap, reach, heads, slots, split,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    i_program, i_batch = tl.program_id(0), tl.program_id(1)
    ends = tl.cumsum(_splits(bounds, heads, slots, split, BLOCK_H), 0)
    i_head = tl.sum((ends <= i_program).to(tl.int32), 0)
    first = (i_program - tl.max(tl.where(ends <= i_program, ends, 0), 0)) * split
    window, sink = tl.load(bounds + i_head), tl.load(bounds + heads + i_head)
    ring = tl.load(bounds + 2 * heads + i_head)
    await_previous(EARLY)  # which does not write the bounds
    length = tl.load(lengths + i_batch).to(tl.int32)
    held = tl.minimum(length, sink + ring)  # slots in use
    if first >= held:
        return
    o_m, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o_d, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    o_t, o_g = o_m // GROUP, o_m % GROUP  # the rows of the tile: tokens, and in each the heads of the group
    real = o_m < GROUP * TOKENS
    p_q = q + i_batch.to(tl.int64) * stride_qb + (i_head * GROUP + o_g) * stride_qh + o_t * stride_qt
    b_q = tl.load(p_q[:, None] + o_d * stride_qd, mask=real[:, None] & (o_d < DIM), other=0.0)
    b_q = b_q.to(tl.float32) if UPCAST else b_q
    position = length - TOKENS + o_t

    # Slots that every query sees, as long as slots are positions, and where the last round of the ring begins.
    clear_first = tl.where(length > held, held, length - tl.minimum(window, reach))
    clear_stop = length - TOKENS + 1
    last = length - 1 - sink
    turn = last - last % ring
    b_max = tl.full([BLOCK_M], _LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    factor = _LOG2E if SOFTCAP else scale * _LOG2E
    p_table = table + i_batch.to(tl.int64) * stride_tb + i_head * stride_th
    for start in range(first, tl.minimum(first + split, held), BLOCK_N):
        slot = start + o_n
        used = slot < held
        if PAGE % BLOCK_N == 0:
            page = tl.load(p_table + start // PAGE).to(tl.int64)
            p_k = k_pages + page * stride_kp + (start % PAGE + o_n) * stride_ks
            p_v = v_pages + page * stride_vp + (start % PAGE + o_n) * stride_vs
        else:
            page = tl.load(p_table + slot // PAGE, mask=used, other=0).to(tl.int64)
            p_k = k_pages + page * stride_kp + (slot % PAGE) * stride_ks
            p_v = v_pages + page * stride_vp + (slot % PAGE) * stride_vs
        b_k = _load(p_k, used, DIM, BLOCK_D, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if SOFTCAP:
            b_s = softcap * (2 * tl.sigmoid(2 * b_s * scale / softcap) - 1)
        b_s *= factor
        if (start < clear_first) | (start + BLOCK_N > clear_stop):
            # A slot of the ring holds the last position that falls on it.
            key = slot + tl.where(slot < sink, 0, tl.where(slot - sink + turn > last, turn - ring, turn))
            seen = (key > position[:, None] - window) | (key < sink)
            seen = seen & (key <= position[:, None]) & (key > position[:, None] - reach) & used
            b_s = tl.where(seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_old = tl.exp2(b_max - b_new)
        b_v = _load(p_v, used, VALUE_DIM, BLOCK_V, UPCAST)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_old[:, None], input_precision="ieee")
        b_sum, b_max = b_sum * b_old + tl.sum(b_p, 1), b_new

    b_sum = tl.where(real, b_sum, 1.0)
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    b_lse = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
    row = (i_batch * tl.num_programs(0) + i_program).to(tl.int64) * GROUP * TOKENS + o_m
    tl.store(part_lse + row, b_lse, mask=real)
    tl.store(part_out + row[:, None] * VALUE_DIM + o_v, b_out, mask=real[:, None] & (o_v < VALUE_DIM))


@triton.jit
def _merge_kernel(
    part_out, part_lse, lengths, bounds, s_aux, out, heads, slots, split, programs,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr, HAS_SINK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    i_m, i_head, i_batch = tl.program_id(0) % (GROUP * TOKENS), tl.program_id(1), tl.program_id(2)
    o_v = tl.program_id(0) // (GROUP * TOKENS) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_s = tl.arange(0, BLOCK_S)
    kept = tl.load(bounds + heads + i_head) + tl.load(bounds + 2 * heads + i_head)
    splits = _splits(bounds, heads, slots, split, BLOCK_H)
    first = i_batch * programs + tl.sum(tl.where(tl.arange(0, BLOCK_H) < i_head, splits, 0), 0)
    await_previous(EARLY)  # which does not write the bounds
    held = tl.minimum(tl.load(lengths + i_batch).to(tl.int32), kept)
    # Every lane merges splits of its own; the lanes come together last.
    b_max, b_sum = tl.full([BLOCK_S], _LOWEST, tl.float32), tl.zeros([BLOCK_S], tl.float32)
    b_out = tl.zeros([BLOCK_S, BLOCK_V], tl.float32)
    for start in range(0, tl.cdiv(held, split), BLOCK_S):
        written = start + o_s < tl.cdiv(held, split)
        row = (first + start + o_s).to(tl.int64) * GROUP * TOKENS + i_m
        b_lse = tl.load(part_lse + row, mask=written, other=float("-inf"))
        mask = written[:, None] & (o_v < VALUE_DIM)
        b_part = tl.load(part_out + row[:, None] * VALUE_DIM + o_v, mask=mask, other=0.0)
        b_new = tl.maximum(b_max, b_lse)
        b_old, b_weight = tl.exp2(b_max - b_new), tl.exp2(b_lse - b_new)
        b_out = b_out * b_old[:, None] + b_part * b_weight[:, None]
        b_sum, b_max = b_sum * b_old + b_weight, b_new
    top = tl.max(b_max, 0)
    head = i_head * GROUP + i_m % GROUP
    if HAS_SINK:  # one more logit, with no value behind it
        logit = tl.load(s_aux + head).to(tl.float32) * _LOG2E
        top = tl.maximum(top, logit)
    b_weight = tl.exp2(b_max - top)
    total = tl.sum(b_sum * b_weight, 0)
    if HAS_SINK:
        total += tl.exp2(logit - top)
    b_row = tl.sum(b_out * b_weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    row = (i_batch * TOKENS + i_m // GROUP).to(tl.int64) * heads * GROUP + head
    tl.store(out + row * VALUE_DIM + o_v, b_row.to(out.dtype.element_ty), mask=o_v < VALUE_DIM)
