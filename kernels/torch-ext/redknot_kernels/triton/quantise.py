"""Pages of 8 and 4 bits in Triton: quantising what leaves the hot tails, or what is new."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..plain.cold import place as plain_place
from ..plain.quantise import TAIL, turn, turned_block
from .pages import INTERPRETING, append_hot, await_previous, early_launch, on_its_device, place_hot

# Pages of a row that are quantised side by side in a long step; the counts then follow in a launch of their own.
_PARTS = 64
_TAIL = tl.constexpr(TAIL)
_LEAST, _MOST = tl.constexpr(2.0**-24), tl.constexpr(65504.0)


def append(pages, k_new, v_new, table, lengths, rules, cold=None):
    """Writes a step's tokens behind the rows' ends; see the plain `append`. Rows may be of any length."""
    if cold is not None:  # first, since the ring may lose it
        cool(pages, cold, table, lengths + k_new.shape[2], rules, (k_new, v_new))
    append_hot(pages, k_new, v_new, table, lengths, rules)


def place(pages, keys, values, table, rules, kept, span, rotation=None, cold=None):
    """Continues the rows of one sequence with a stored span of tokens; see the plain `place` for the arguments."""
    plain_place(pages, keys, values, table, rules, kept, span, rotation, cold, place_hot, cool)


@on_its_device
def cool(pages, cold, table, lengths, rules, new=None):
    """Quantises the pages of stored rows that have left the hot tail; see the plain `cool` for the arguments."""
    tokens = 0 if new is None else new[0].shape[2]
    most = triton.cdiv(tokens, rules.page_size) if new is not None else cold.table.shape[2]
    parts = min(_PARTS, most) if tokens > rules.page_size else 1
    bounds = rules.tensors(lengths.device)
    launch_cool(pages, cold, table, lengths, bounds, rules.hot, rules.storage, new, parts)
    if parts > 1:
        is_stored = bounds[3] > 0
        target = rules.cold_pages(lengths)[:, None] * is_stored
        torch.maximum(cold.counts, target.to(torch.int32), out=cold.counts)


def launch_cool(pages, cold, table, lengths, bounds, hot, storage, new=None, parts=1):
    """The launch itself; with several parts the counts stay as they are. `storage`: the bits that occur."""
    k_new, v_new = pages if new is None else new
    strides = [x.stride() if new is not None else (0,) * 4 for x in (k_new, v_new)]
    sizes = sizes_of(pages)
    batch, heads, _ = table.shape
    wide = max(sizes["BLOCK_D"], sizes["BLOCK_V"]) * sizes["PAGE"]
    _cool_kernel[(parts, heads, batch)](
        *pages, k_new, v_new, table, lengths, bounds, *pools(cold, pages), cold.table, cold.counts,
        *pages.keys.stride()[:2], *pages.values.stride()[:2], *strides[0], *strides[1], *table.stride()[:2],
        *cold.table.stride()[:2], heads, hot, 0 if new is None else k_new.shape[2],
        **sizes, HAS_NEW=new is not None, INT8=8 in storage, INT4=4 in storage, UPCAST=INTERPRETING,
        num_warps=8 if wide > 8192 else 4, **early_launch(lengths.device),
    )  # fmt: skip


def pools(cold, pages):
    """Codes and scales of both storages and the signs of turned keys; of what does not occur something not read."""
    turning = pages.keys if cold.int4 is None else signs(pages.keys.shape[-1], pages.device, pages.keys.dtype)
    return [*(x for pool in (cold.int8, cold.int4) for x in (pool or pages)), turning]


def sizes_of(pages):
    """What a kernel over pages is compiled for."""
    (_, page, dim), value_dim = pages.keys.shape, pages.values.shape[-1]
    blocks = {"BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_V": max(16, triton.next_power_of_2(value_dim))}
    return {"DIM": dim, "VALUE_DIM": value_dim, "PAGE": page, "TURNED": turned_block(dim), **blocks}


@lru_cache(maxsize=64)
def signs(dim, device, dtype):
    """The Hadamard matrix that turns keys, without its factor: `[dim, dim]`, 0 outside of its blocks."""
    return (turn(dim, device) * turned_block(dim) ** 0.5).round().to(dtype)


@triton.jit
def turned(
    b_x, signs, o_out, FROM: tl.constexpr, COUNT: tl.constexpr, TO: tl.constexpr, WANTED: tl.constexpr,
    DIM: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """What the channels from `FROM` on, `[rows, block]`, give of the turned ones `TO + o_out`; in float32."""
    o_in = tl.arange(0, b_x.shape[1])
    pointers = signs + (FROM + o_in)[:, None] * DIM + (TO + o_out)[None, :]
    if b_x.shape[1] == COUNT and o_out.shape[0] == WANTED:
        b_signs = tl.load(pointers)
    else:
        b_signs = tl.load(pointers, mask=(o_in < COUNT)[:, None] & (o_out < WANTED)[None, :], other=0.0)
    return tl.dot(b_x, b_signs.to(b_x.dtype), input_precision="ieee") * (TURNED**-0.5)


@triton.jit
def _fresh_or_kept(p_pages, p_new, stride_s, stride_t, stride_d, position, first_new, o_n, o_d, used,
                   HAS_NEW: tl.constexpr):  # fmt: skip
    """Tokens of a page in float-like dtype: from the ring, or from the step whose first position is `first_new`."""
    in_ring = used[None, :] & (position < first_new)[:, None] if HAS_NEW else used[None, :]
    b_x = tl.load((p_pages + o_n * stride_s)[:, None] + o_d, mask=in_ring, other=0.0)
    if HAS_NEW:
        is_new = (position >= first_new)[:, None] & used[None, :]
        p_x = (p_new + (position - first_new).to(tl.int64) * stride_t)[:, None] + o_d * stride_d
        b_x += tl.load(p_x, mask=is_new, other=0.0)
    return b_x


@triton.jit
def _scaled(low, high, LEVELS: tl.constexpr):
    """Scale before rounding, and the zero."""
    b_zero = tl.minimum(tl.maximum(low, -_MOST), _MOST).to(tl.float16).to(tl.float32)
    return (high - low) / LEVELS, b_zero


@triton.jit
def _coded(b_x, b_scale, b_zero, LEVELS: tl.constexpr):
    b_codes = tl.floor((b_x - b_zero) / b_scale + 0.5)
    return tl.minimum(tl.maximum(b_codes, 0.0), LEVELS + 0.0).to(tl.uint8)


@triton.jit
def _rounded(b_scale):
    return tl.minimum(tl.maximum(b_scale, _LEAST), _MOST).to(tl.float16)


@triton.jit
def _quantise_keys(b_k, signs, p_codes, p_scales, o_n, BITS: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr,
                   BLOCK_D: tl.constexpr):  # fmt: skip
    """Writes keys `[page, dim]`: a scale and a zero for each channel."""
    LEVELS: tl.constexpr = 2**BITS - 1
    HALVES: tl.constexpr = 8 // BITS
    COUNT: tl.constexpr = DIM // HALVES
    BLOCK: tl.constexpr = BLOCK_D if BITS == 8 else max(16, BLOCK_D // 2)
    o_c = tl.arange(0, BLOCK)
    b_byte = tl.zeros([b_k.shape[0], BLOCK], tl.uint8)
    for HALF in tl.static_range(HALVES):
        b_x = b_k.to(tl.float32) if BITS == 8 else turned(b_k, signs, o_c, 0, DIM, HALF * COUNT, COUNT, DIM, TURNED)
        b_scale, b_zero = _scaled(tl.min(b_x, 0), tl.max(b_x, 0), LEVELS)
        b_scale = _rounded(b_scale)
        b_codes = _coded(b_x, b_scale.to(tl.float32)[None, :], b_zero[None, :], LEVELS)
        b_byte = b_byte | (b_codes << (4 * HALF)).to(tl.uint8)
        tl.store(p_scales + HALF * COUNT + o_c, b_scale, mask=o_c < COUNT)
        tl.store(p_scales + DIM + HALF * COUNT + o_c, b_zero.to(tl.float16), mask=o_c < COUNT)
    tl.store(p_codes + o_n[:, None] * COUNT + o_c[None, :], b_byte, mask=(o_c < COUNT)[None, :])


@triton.jit
def _quantise_values(b_v, b_w, p_codes, p_scales, used_v, used_w, o_n, o_c, BITS: tl.constexpr, COUNT: tl.constexpr,
                     PAGE: tl.constexpr):  # fmt: skip
    """Writes values, the low half of their channels and the high one: a scale and a zero for each token."""
    LEVELS: tl.constexpr = 2**BITS - 1
    b_low = tl.min(tl.where(used_v[None, :], b_v, float("inf")), 1)
    b_high = tl.max(tl.where(used_v[None, :], b_v, float("-inf")), 1)
    if BITS == 4:
        b_low = tl.minimum(b_low, tl.min(tl.where(used_w[None, :], b_w, float("inf")), 1))
        b_high = tl.maximum(b_high, tl.max(tl.where(used_w[None, :], b_w, float("-inf")), 1))
    b_scale, b_zero = _scaled(b_low, b_high, LEVELS)
    # The next power of two above the largest scale.
    top = tl.minimum(tl.maximum(tl.max(b_scale, 0), 2.0**-15), _MOST / 2)
    top = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 2
    b_share = _rounded(b_scale / top)
    b_step = (b_share.to(tl.float32) * top)[:, None]
    b_byte = _coded(b_v, b_step, b_zero[:, None], LEVELS)
    if BITS == 4:
        b_byte = b_byte | (_coded(b_w, b_step, b_zero[:, None], LEVELS) << 4).to(tl.uint8)
    tl.store(p_scales + o_n, b_share)
    tl.store(p_scales + PAGE + o_n, b_zero.to(tl.float16))
    o_tail = tl.arange(0, _TAIL)
    tl.store(p_scales + 2 * PAGE + o_tail, tl.where(o_tail == 0, top, 0.0).to(tl.float16))
    tl.store(p_codes + o_c[None, :] * PAGE + o_n[:, None], b_byte, mask=(o_c < COUNT)[None, :])


@triton.jit
def _quantise(b_k, signs, p_v, p_v_new, stride_vs, stride_nvt, stride_nvd, position, first_new, o_n, codes, scales,
              page, BITS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
              TURNED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_NEW: tl.constexpr):  # fmt: skip
    """Writes one page: its keys, which are here, and its values, which are read."""
    COUNT: tl.constexpr = VALUE_DIM * BITS // 8
    BLOCK: tl.constexpr = BLOCK_V if BITS == 8 else max(16, BLOCK_V // 2)
    p_codes = codes + page * (PAGE * (DIM + VALUE_DIM) * BITS // 8)
    p_scales = scales + page * (2 * (DIM + PAGE) + _TAIL)
    o_c = tl.arange(0, BLOCK)
    used = o_c < COUNT
    _quantise_keys(b_k, signs, p_codes, p_scales, o_n, BITS, DIM, TURNED, BLOCK_D)
    b_v = _fresh_or_kept(p_v, p_v_new, stride_vs, stride_nvt, stride_nvd, position, first_new, o_n, o_c, used,
                         HAS_NEW).to(tl.float32)  # fmt: skip
    b_w, used_w = b_v, used
    if BITS == 4:
        b_w = _fresh_or_kept(p_v + COUNT, p_v_new + COUNT * stride_nvd, stride_vs, stride_nvt, stride_nvd, position,
                             first_new, o_n, o_c, used, HAS_NEW).to(tl.float32)  # fmt: skip
    p_codes += PAGE * DIM * BITS // 8
    _quantise_values(b_v, b_w, p_codes, p_scales + 2 * DIM, used, used_w, o_n, o_c, BITS, COUNT, PAGE)


@triton.jit
def cool_row(
    k_pages, v_pages, p_nk, p_nv, p_table, codes8, scales8, codes4, scales4, signs, p_cold, stride_kp, stride_ks,
    stride_vp, stride_vs, stride_nkt, stride_nkd, stride_nvt, stride_nvd, bits, done, target, ring, length, tokens,
    i_part, parts, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_NEW: tl.constexpr, INT8: tl.constexpr, INT4: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Quantises a row's pages from `done` to `target`, or one in so many of them."""
    first_new = length - tokens
    o_n, o_d = tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    for i in range(done + i_part, target, parts):
        position = (i + 1) * PAGE + o_n
        column = 1 + i % (ring // PAGE)
        is_here = first_new > (i + 1) * PAGE if HAS_NEW else i >= 0
        page = tl.load(p_table + column, mask=is_here, other=0).to(tl.int64)
        p_k, p_v = k_pages + page * stride_kp, v_pages + page * stride_vp
        b_k = _fresh_or_kept(p_k, p_nk, stride_ks, stride_nkt, stride_nkd, position, first_new, o_n, o_d,
                             o_d < DIM, HAS_NEW)  # fmt: skip
        b_k = b_k.to(tl.float32) if UPCAST else b_k
        to = tl.load(p_cold + i).to(tl.int64)
        if INT8:  # noqa: SIM102 - a constant, and the other is not
            if bits == 8:
                _quantise(b_k, signs, p_v, p_nv, stride_vs, stride_nvt, stride_nvd, position, first_new, o_n,
                          codes8, scales8, to, 8, DIM, VALUE_DIM, PAGE, TURNED, BLOCK_D, BLOCK_V, HAS_NEW)  # fmt: skip
        if INT4:  # noqa: SIM102
            if bits == 4:
                _quantise(b_k, signs, p_v, p_nv, stride_vs, stride_nvt, stride_nvd, position, first_new, o_n,
                          codes4, scales4, to, 4, DIM, VALUE_DIM, PAGE, TURNED, BLOCK_D, BLOCK_V, HAS_NEW)  # fmt: skip


@triton.jit
def cold_target(bits, length, hot, PAGE: tl.constexpr):
    """How many pages of a row of this length are cold."""
    return tl.where(bits > 0, tl.maximum(length - hot, 0) // PAGE - 1, 0)


@triton.jit(do_not_specialize=["stride_tb", "stride_th", "stride_cb", "stride_ch", "tokens"])
def _cool_kernel(
    k_pages, v_pages, k_new, v_new, table, lengths, bounds, codes8, scales8, codes4, scales4, signs, cold_table,
    cold_counts, stride_kp, stride_ks, stride_vp, stride_vs, stride_nkb, stride_nkh, stride_nkt, stride_nkd,
    stride_nvb, stride_nvh, stride_nvt, stride_nvd, stride_tb, stride_th, stride_cb, stride_ch, heads, hot, tokens,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_NEW: tl.constexpr, INT8: tl.constexpr, INT4: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    i_part, i_head, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    bits, ring = tl.load(bounds + 3 * heads + i_head), tl.load(bounds + 2 * heads + i_head)
    length = tl.load(lengths + i_batch).to(tl.int32)
    done, target = tl.load(cold_counts + i_batch * heads + i_head), cold_target(bits, length, hot, PAGE)
    cool_row(
        k_pages, v_pages, k_new + i_batch * stride_nkb + i_head * stride_nkh,
        v_new + i_batch * stride_nvb + i_head * stride_nvh, table + i_batch * stride_tb + i_head * stride_th,
        codes8, scales8, codes4, scales4, signs, cold_table + i_batch * stride_cb + i_head * stride_ch, stride_kp,
        stride_ks, stride_vp, stride_vs, stride_nkt, stride_nkd, stride_nvt, stride_nvd, bits, done, target, ring,
        length, tokens, i_part, tl.num_programs(0), DIM, VALUE_DIM, PAGE, TURNED, BLOCK_D, BLOCK_V, HAS_NEW, INT8,
        INT4, UPCAST,
    )  # fmt: skip
    if (tl.num_programs(0) == 1) & (target > done):
        tl.store(cold_counts + i_batch * heads + i_head, target)
