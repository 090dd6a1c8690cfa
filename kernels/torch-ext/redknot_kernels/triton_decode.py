"""Attention of a few new tokens over pages, in Triton: split over the keys of every row, then merged.

A program takes one split of one row and the query heads of its group; programs beyond a row's end leave at once, so
that a long row among short ones still fills the chip. Lengths and tables are read on the device: a launch can be
captured.
"""

import torch
import triton
import triton.language as tl

from .triton_pages import INTERPRETING, check_device

_LOG2E = tl.constexpr(1.4426950408889634)


def decode(query, k_pages, v_pages, table, lengths, rules, *, scale, softcap=None, s_aux=None):
    """Attends the last tokens of every row over the whole row; see the plain `decode` for the arguments."""
    check_device(query)
    batch, query_heads, tokens, dim = query.shape
    heads, value_dim = rules.heads, v_pages.shape[-1]
    group = query_heads // heads
    block_n, split = 64, _split(batch * heads, table.shape[2] * rules.page_size, query.device)
    splits = max(1, -(-table.shape[2] * rules.page_size // split))
    rows = triton.next_power_of_2(max(16, group * tokens))
    bounds = rules.tensors(query.device)
    out = query.new_empty(batch, tokens, query_heads, value_dim)
    part_out = torch.empty(batch, heads, splits, group * tokens, value_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(batch, heads, splits, group * tokens, dtype=torch.float32, device=query.device)
    sizes = {
        "GROUP": group, "TOKENS": tokens, "DIM": dim, "VALUE_DIM": value_dim, "SPLIT": split,
        "BLOCK_V": triton.next_power_of_2(value_dim),
    }  # fmt: skip
    _split_kernel[(splits, heads, batch)](
        query, k_pages, v_pages, table, lengths, bounds, part_out, part_lse,
        *query.stride(), *k_pages.stride()[:2], *v_pages.stride()[:2], *table.stride()[:2],
        scale, softcap or 0.0, rules.reach, heads, splits,
        **sizes, PAGE=rules.page_size, BLOCK_M=rows, BLOCK_N=block_n, BLOCK_D=triton.next_power_of_2(dim),
        SOFTCAP=softcap is not None, UPCAST=INTERPRETING,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _merge_kernel[(tokens * group, heads, batch)](
        part_out, part_lse, lengths, bounds, out if s_aux is None else s_aux, out, heads, splits,
        **sizes, HAS_SINK=s_aux is not None, num_warps=4,
    )  # fmt: skip
    return out


def _split(rows, slots, device):
    """Slots of a split: enough programs to fill the chip some times over, none of them too short to stream."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = rows * slots // (4 * processors)
    return min(max(triton.next_power_of_2(max(wanted, 1)), 256), 4096)


@triton.jit
def _split_kernel(
    q, k_pages, v_pages, table, lengths, bounds, part_out, part_lse,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kp, stride_ks, stride_vp, stride_vs, stride_tb, stride_th,
    scale, softcap, reach, heads, splits,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_V: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_split, i_head, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + i_batch).to(tl.int32)
    window, sink = tl.load(bounds + i_head), tl.load(bounds + heads + i_head)
    ring = tl.load(bounds + 2 * heads + i_head)
    held = tl.minimum(length, sink + ring)  # slots in use
    first = i_split * SPLIT
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

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    p_table = table + i_batch.to(tl.int64) * stride_tb + i_head * stride_th
    for start in range(first, tl.minimum(first + SPLIT, held), BLOCK_N):
        slot = start + o_n
        used = slot < held
        page = tl.load(p_table + slot // PAGE, mask=used, other=0).to(tl.int64)
        p_k = k_pages + page * stride_kp + (slot % PAGE) * stride_ks
        b_k = tl.load(p_k[:, None] + o_d, mask=used[:, None] & (o_d < DIM), other=0.0)
        b_k = b_k.to(tl.float32) if UPCAST else b_k
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        if SOFTCAP:
            b_s = softcap * (2 * tl.sigmoid(2 * b_s / softcap) - 1)
        # A slot of the ring holds the last position that falls on it.
        last = length - 1 - sink
        key = tl.where(slot < sink, slot, sink + last - (last - (slot - sink)) % ring)
        seen = (key > position[:, None] - window) | (key < sink)
        seen = seen & (key <= position[:, None]) & (key > position[:, None] - reach) & used
        b_s = tl.where(seen, b_s * _LOG2E, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_old = tl.exp2(b_max - b_safe)
        p_v = v_pages + page * stride_vp + (slot % PAGE) * stride_vs
        b_v = tl.load(p_v[:, None] + o_v, mask=used[:, None] & (o_v < VALUE_DIM), other=0.0)
        b_v = b_v.to(tl.float32) if UPCAST else b_v
        b_out = b_out * b_old[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_max = b_new

    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))
    row = ((i_batch * heads + i_head) * splits + i_split).to(tl.int64) * GROUP * TOKENS + o_m
    tl.store(part_lse + row, b_lse, mask=real)
    tl.store(part_out + row[:, None] * VALUE_DIM + o_v, b_out, mask=real[:, None] & (o_v < VALUE_DIM))


@triton.jit
def _merge_kernel(
    part_out, part_lse, lengths, bounds, s_aux, out, heads, splits,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_V: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    i_m, i_head, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + i_batch).to(tl.int32)
    held = tl.minimum(length, tl.load(bounds + heads + i_head) + tl.load(bounds + 2 * heads + i_head))
    o_v = tl.arange(0, BLOCK_V)
    b_max, b_sum = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    if HAS_SINK:  # one more logit, with no value behind it
        b_max = tl.zeros([1], tl.float32) + tl.load(s_aux + i_head * GROUP + i_m % GROUP).to(tl.float32) * _LOG2E
        b_sum = tl.full([1], 1.0, tl.float32)
    b_out = tl.zeros([BLOCK_V], tl.float32)
    for i_split in range(tl.cdiv(held, SPLIT)):
        row = ((i_batch * heads + i_head) * splits + i_split).to(tl.int64) * GROUP * TOKENS + i_m
        b_lse = tl.load(part_lse + row)
        b_part = tl.load(part_out + row * VALUE_DIM + o_v, mask=o_v < VALUE_DIM, other=0.0)
        b_new = tl.maximum(b_max, b_lse)
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_old, b_weight = tl.exp2(b_max - b_safe), tl.exp2(b_lse - b_safe)
        b_out = b_out * b_old + b_part * b_weight
        b_sum = b_sum * b_old + b_weight
        b_max = b_new
    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)
    token, head = i_m // GROUP, i_head * GROUP + i_m % GROUP
    row = (i_batch * TOKENS + token).to(tl.int64) * heads * GROUP + head
    tl.store(out + row * VALUE_DIM + o_v, b_out.to(out.dtype.element_ty), mask=o_v < VALUE_DIM)
