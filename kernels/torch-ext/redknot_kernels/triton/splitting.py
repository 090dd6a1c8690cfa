"""Attending one split of a row, in Triton, and writing the new tokens: the first kernel of a step."""

import triton
import triton.language as tl

from .cold import attend_cold, pages_at
from .pages import await_previous
from .sharing import shares_of
from .tiles import LOG2E, LOWEST, load_rows


@triton.jit
def _scores(b_q, b_k, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores as powers of two."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if SOFTCAP:
        b_s = softcap * (2 * tl.sigmoid(2 * b_s * scale / softcap) - 1) * LOG2E
    else:
        b_s *= scale * LOG2E
    return b_s


@triton.jit
def _accumulate(b_s, b_v, b_out, b_max, b_sum):
    """Takes a tile of keys into the softmax."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_old[:, None], input_precision="ieee")
    return b_out, b_new, b_sum * b_old + tl.sum(b_p, 1)


# Of `tokens` only 1 is a case of its own, lest questions of every length be compiled for.
@triton.jit(
    do_not_specialize=["stride_tb", "stride_th", "stride_cb", "stride_ch", "batch", "slots"],
    do_not_specialize_on_alignment=["tokens"],
)
def split_kernel(
    q, k_pages, v_pages, k_new, v_new, table, counts, flags, bounds, codes8, scales8, codes4, scales4, signs,
    cold_table, cold_counts, part_out, part_lse, shares,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_nkb, stride_nkh, stride_nkt, stride_nkd,
    stride_nvb, stride_nvh, stride_nvt, stride_nvd, stride_kp, stride_ks, stride_vp, stride_vs, stride_tb, stride_th,
    stride_cb, stride_ch, scale, softcap, reach, batch, heads, slots, tokens,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
    FUSED: tl.constexpr, HAS_FLAGS: tl.constexpr, MIN_SPLIT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    COLD: tl.constexpr, INT8: tl.constexpr, INT4: tl.constexpr, TURNED: tl.constexpr, BLOCK_C: tl.constexpr,
    FEW: tl.constexpr, WARPS: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attends a tile of a group's queries over one split of a row; a row's first program takes the new tokens too."""
    await_previous(EARLY)
    i_tile, i_program = tl.program_id(0), tl.program_id(1)
    PARTS: tl.constexpr = 2 if COLD else 1
    TURN: tl.constexpr = WARPS * BLOCK_C if COLD else 0
    split, row_slots, stops = shares_of(
        counts, cold_counts, bounds, batch, heads, slots, MIN_SPLIT, BLOCK_R, BLOCK_N, PAGE, TURN
    )
    if i_program >= tl.max(stops, 0):
        return
    i_share = tl.sum((stops <= i_program).to(tl.int32), 0)
    i_row = i_share // PARTS
    first_program = tl.max(tl.where(stops <= i_program, stops, 0), 0)
    i_batch, i_head = (i_row // heads).to(tl.int64), i_row % heads
    window, sink = tl.load(bounds + i_head), tl.load(bounds + heads + i_head)
    ring = tl.load(bounds + 2 * heads + i_head)
    length = tl.load(counts + i_batch).to(tl.int32)  # of what the pages hold
    held = tl.minimum(tl.minimum(length, sink + ring), slots)
    o_m, o_n, o_new = i_tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    o_d, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    o_t, o_g = o_m // GROUP, o_m % GROUP  # the rows of the tile: tokens, and in each the heads of the group
    asked = o_m < GROUP * tokens
    p_q = q + i_batch * stride_qb + (i_head * GROUP + o_g) * stride_qh + o_t * stride_qt
    b_q = tl.load(p_q[:, None] + o_d * stride_qd, mask=asked[:, None] & (o_d < DIM), other=0.0)
    b_q = b_q.to(tl.float32) if UPCAST else b_q
    part = i_program.to(tl.int64) * GROUP * tokens + o_m
    cold_end = 0  # where what lies behind the sink begins
    if COLD:
        cold_count = tl.load(cold_counts + i_row)
        bits = tl.load(bounds + 3 * heads + i_head)
        if i_share % PARTS == 0:  # cold pages
            split = tl.cdiv(split, TURN) * TURN
            first = (i_program - first_program) * split
            stop = tl.minimum(first + split, tl.sum(tl.where(tl.arange(0, BLOCK_R) == i_share, row_slots, 0), 0))
            p_cold = cold_table + i_batch * stride_cb + i_head * stride_ch
            b_page, b_part = pages_at(p_cold, first, (stop - 1) // PAGE, tl.arange(0, WARPS), PAGE, BLOCK_C)
            o_few = i_tile * FEW + tl.arange(0, FEW)
            p_few = q + i_batch * stride_qb + (i_head * GROUP + o_few % GROUP) * stride_qh + o_few // GROUP * stride_qt
            few_asked, few = o_few < GROUP * tokens, i_program.to(tl.int64) * GROUP * tokens + o_few
            p_out, p_lse = part_out + few * VALUE_DIM, part_lse + few
            if INT8:  # noqa: SIM102 - a constant, and the other is not
                if bits == 8:
                    attend_cold(
                        p_few, stride_qd, codes8, scales8, signs, p_cold, b_page, b_part, first, stop, p_out, p_lse,
                        few_asked, scale, softcap, 8, DIM, VALUE_DIM, PAGE, TURNED, BLOCK_C, BLOCK_D, BLOCK_V, WARPS,
                        SOFTCAP, PTX, WIDE,
                    )  # fmt: skip
            if INT4:  # noqa: SIM102
                if bits == 4:
                    attend_cold(
                        p_few, stride_qd, codes4, scales4, signs, p_cold, b_page, b_part, first, stop, p_out, p_lse,
                        few_asked, scale, softcap, 4, DIM, VALUE_DIM, PAGE, TURNED, BLOCK_C, BLOCK_D, BLOCK_V, WARPS,
                        SOFTCAP, PTX, WIDE,
                    )  # fmt: skip
            return
        cold_end = tl.where(bits > 0, (cold_count + 1) * PAGE, 0)
    p_table = table + i_batch * stride_tb + i_head * stride_th
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    real = o_new < tokens
    if HAS_FLAGS:
        real = real & (tl.load(flags + i_batch * tokens + o_new, mask=real, other=0) != 0)
    if FUSED:
        before = (o_new[None, :] <= o_t[:, None]) & real[None, :]
        position = length + tl.sum(before.to(tl.int32), 1) - 1
        end = length + tl.sum(real.to(tl.int32), 0)
    else:
        position, end = length - tokens + o_t, length
    if i_program == first_program:
        first_of_row = tl.max(tl.where(tl.arange(0, BLOCK_R) < i_row * PARTS, stops, 0), 0)
        tl.store(shares + i_row, first_of_row)
        own = tl.sum(tl.where(tl.arange(0, BLOCK_R) == i_share, stops, 0), 0) - first_of_row
        tl.store(shares + batch * heads + i_row, own)
        if COLD:
            tl.store(shares + 2 * batch * heads + i_row, end)
        if FUSED:
            key = length + tl.cumsum(real.to(tl.int32), 0) - 1
            slot = tl.where(key < sink, key, sink + (key - sink) % ring)
            p_k = k_new + i_batch * stride_nkb + i_head * stride_nkh + o_new * stride_nkt
            p_v = v_new + i_batch * stride_nvb + i_head * stride_nvh + o_new * stride_nvt
            b_k = tl.load(p_k[:, None] + o_d * stride_nkd, mask=real[:, None] & (o_d < DIM), other=0.0)
            b_v = tl.load(p_v[:, None] + o_v * stride_nvd, mask=real[:, None] & (o_v < VALUE_DIM), other=0.0)
            if i_tile == 0:
                written = real & (slot < slots)  # beyond the last page there is no room
                page = tl.load(p_table + slot // PAGE, mask=written, other=0).to(tl.int64)
                p_slots = (k_pages + page * stride_kp + slot % PAGE * stride_ks)[:, None] + o_d
                tl.store(p_slots, b_k, mask=written[:, None] & (o_d < DIM))
                p_slots = (v_pages + page * stride_vp + slot % PAGE * stride_vs)[:, None] + o_v
                tl.store(p_slots, b_v, mask=written[:, None] & (o_v < VALUE_DIM))
            b_k, b_v = (b_k.to(tl.float32), b_v.to(tl.float32)) if UPCAST else (b_k, b_v)
            b_s = _scores(b_q, b_k, scale, softcap, SOFTCAP)
            seen = (key[None, :] > position[:, None] - window) | (key < sink)[None, :]
            seen = seen & before & (key[None, :] > position[:, None] - reach)
            b_s = tl.where(seen, b_s, float("-inf"))
            b_out, b_max, b_sum = _accumulate(b_s, b_v, b_out, b_max, b_sum)

    # Slots that every query sees, as long as slots are positions, and where the last round of the ring begins.
    clear_first = tl.where((length > held) | (cold_end > PAGE), held, end - tl.minimum(window, reach))
    clear_stop = tl.where(FUSED, held, length - tokens + 1)
    last = length - 1 - sink
    turn = last - last % ring
    first = (i_program - first_program) * split
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
        b_k = load_rows(p_k, used, DIM, BLOCK_D, UPCAST)
        b_s = _scores(b_q, b_k, scale, softcap, SOFTCAP)
        if (start < clear_first) | (start + BLOCK_N > clear_stop):
            # A slot of the ring holds the last position that falls on it.
            key = slot + tl.where(slot < sink, 0, tl.where(slot - sink + turn > last, turn - ring, turn))
            seen = (key > position[:, None] - window) | (key < sink)
            seen = seen & (key <= position[:, None]) & (key > position[:, None] - reach) & used
            if COLD:
                seen = seen & ((key >= cold_end) | (key < sink))
            b_s = tl.where(seen, b_s, float("-inf"))
        b_v = load_rows(p_v, used, VALUE_DIM, BLOCK_V, UPCAST)
        b_out, b_max, b_sum = _accumulate(b_s, b_v, b_out, b_max, b_sum)

    b_sum = tl.where(asked, b_sum, 1.0)
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    b_lse = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
    tl.store(part_lse + part, b_lse, mask=asked)
    tl.store(part_out + part[:, None] * VALUE_DIM + o_v, b_out, mask=asked[:, None] & (o_v < VALUE_DIM))
