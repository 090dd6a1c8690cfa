"""A step of a few new tokens, in Triton: write them to their pages and attend over the rows, in two launches.

The first kernel shares the slots of all rows out among its programs, evenly and by the lengths that it finds on the
device: one long row among short ones fills the chip, and a launch can be captured once for all lengths. A program
takes one split of one row and the query heads of its group, of up to `_QUERIES` queries; the first of a row also takes
the new tokens, from where they are, and writes them. The second kernel merges the splits of every row and counts the
new tokens.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..plain.cold import Cold
from ..plain.pages import Pages
from ..plain.quantise import ColdPages
from .cold import Stored, attend_cold, cold_sizes, cold_strides, cold_tensors, stored_rows
from .configurations import chip_name, configuration, processors
from .merging import merge_kernel
from .pages import INTERPRETING, await_previous, early_launch, on_its_device
from .quantise import launch_cool
from .sharing import shares_of
from .tiles import LOG2E, LOWEST, load_rows

# The fewest slots of a split, and about the most: long ones leave the chip idle where programs end unevenly.
_MIN_SPLIT = 64
_MAX_SPLIT = 2048
# The most queries of a program, tokens times heads of the group: more need more registers and shared memory.
_QUERIES = 64
# The most new tokens of a launch, and the bytes of their keys: a program holds them all at once.
_NEW = 64, 16 << 10
# The most splits a program merges at once, and with them as many value channels: a merge is a matter of latency.
_MERGED = 256, 16


def step(query, pages, k_new, v_new, table, counts, real, rules, *, scale, softcap=None, s_aux=None, cold=None):
    """Writes new tokens and attends them over their rows; see the plain `step` for the arguments."""
    rows = table, counts, rules.tensors(query.device), rules.most_kept(table.shape[2]), rules.reach
    return _steps(query, pages, (k_new, v_new, real), *rows, scale, softcap, s_aux, stored_rows(cold, rules))


def decode(query, pages, table, lengths, rules, *, scale, softcap=None, s_aux=None, cold=None):
    """Attends the last tokens of every row over the whole row; see the plain `decode` for the arguments."""
    rows = table, lengths, rules.tensors(query.device), rules.most_kept(table.shape[2]), rules.reach
    return _launch(query, pages, None, *rows, scale, softcap, s_aux, stored_rows(cold, rules))


@torch.library.custom_op(
    f"{__package__.rpartition('.')[0]}::step",  # beside a build of the package, each has its own
    mutates_args=("k_pages", "v_pages", "counts", "codes8", "scales8", "codes4", "scales4", "cold_counts"),
    schema="(Tensor query, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor? k_new, Tensor? v_new, Tensor table, "
    "Tensor(c!) counts, Tensor? real, Tensor bounds, int most_kept, int reach, float scale, float? softcap, "
    "Tensor? s_aux, Tensor(d!)? codes8, Tensor(e!)? scales8, Tensor(f!)? codes4, Tensor(g!)? scales4, "
    "Tensor? cold_table, Tensor(h!)? cold_counts, int[] storage, int hot) -> Tensor",
)
def captured_step(
    query, k_pages, v_pages, k_new, v_new, table, counts, real, bounds, most_kept, reach, scale, softcap, s_aux,
    codes8, scales8, codes4, scales4, cold_table, cold_counts, storage, hot,
):  # fmt: skip
    """What `captured` runs. It has no defaults: torch up to 2.12 fails where a written argument is left at its own."""
    pages, rows, stored = Pages(k_pages, v_pages), (table, counts, bounds, most_kept, reach), None
    if cold_table is not None:
        pools = ((codes8, scales8), (codes4, scales4))
        pools = (None if codes is None else ColdPages(codes, scales) for codes, scales in pools)
        stored = Stored(Cold(*pools, cold_table, cold_counts), tuple(storage), hot)
    if k_new is None:
        return _launch(query, pages, None, *rows, scale, softcap, s_aux, stored)
    return _steps(query, pages, (k_new, v_new, real), *rows, scale, softcap, s_aux, stored)


@captured_step.register_fake
def _(query, k_pages, v_pages, *_, **__):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, v_pages.shape[-1])


def captured(*step, stored=(*[None] * 6, [], 0)):
    """`step` as one operator, which `torch.compile` takes whole; bounds, most_kept and reach say the `HeadRules`.

    Without new keys and values it is `decode`: it attends tokens that the pages hold already, and counts nothing.

    Args:
        step: query, k_pages, v_pages, k_new, v_new, table, counts, real, bounds, most_kept, reach, scale, softcap
            and s_aux, in this order.
        stored: codes8, scales8, codes4, scales4, cold_table, cold_counts, storage, hot; by default no row is stored.
    """
    return captured_step(*step, *stored)


def most_new_tokens(dim, itemsize):
    """The most new tokens that a launch takes, where keys and values are so wide."""
    return min(_NEW[0], _NEW[1] // (triton.next_power_of_2(dim) * itemsize))


def _steps(query, pages, new, *options):
    """One launch for a step of a few tokens; a longer one is several, each of which sees what the last has written."""
    dim = max(x.shape[2] for x in pages)
    tokens, most = query.shape[2], most_new_tokens(dim, pages.keys.element_size())
    if tokens <= most:
        return _launch(query, pages, new, *options)
    queries, *written = (x.split(most, 2) for x in (query, *new[:2]))
    flags = [None] * len(queries) if new[2] is None else new[2].split(most, 1)
    steps = zip(queries, zip(*written, flags, strict=True), strict=True)
    return torch.cat([_launch(part, pages, parts, *options) for part, parts in steps], 1)


@on_its_device
def _launch(query, pages, new, table, counts, bounds, most_kept, reach, scale, softcap, s_aux, stored):
    """Runs both kernels, and for stored rows the one that lets pages grow cold.

    Args:
        new: Keys, values and flags of new tokens, unless the pages hold them already.
        stored: `Stored`, or `None`.
        (others): As in `decode`; bounds, most_kept and reach say the rules.
    """
    batch, query_heads, tokens, dim = query.shape
    heads, page, value_dim, device = table.shape[1], pages.page_size, pages.values.shape[-1], query.device
    group, slots, power = query_heads // heads, table.shape[2] * page, triton.next_power_of_2
    kind = "rows" if stored is None else "int4" if 4 in stored.storage else "int8"
    tile = configuration("decode", chip_name(device), kind, pages.keys.element_size(), max(dim, value_dim), group)
    cold_slots, parts = 0, 1
    if stored is not None:
        cold_slots, parts = stored.cold.table.shape[2] * page, 2
        most_kept += cold_slots * sum(bits > 0 for bits in stored.storage)
    programs = _programs(parts * batch * heads, batch * most_kept, tile["programs"] * processors(device))
    out = query.new_empty(batch, tokens, query_heads, value_dim)
    part_out = torch.empty(programs, group * tokens, value_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(programs, group * tokens, dtype=torch.float32, device=device)
    shares = torch.empty(2, batch * heads, dtype=torch.int32, device=device)
    k_new, v_new, real = new or (query, query, None)
    flags = counts if real is None else real.contiguous()
    sizes = {"GROUP": group, "VALUE_DIM": value_dim, "FUSED": new is not None}
    sizes |= {"HAS_FLAGS": real is not None, "BLOCK_T": max(16, power(tokens))}
    strides = *query.stride(), *k_new.stride(), *v_new.stride(), *pages.keys.stride()[:2], *pages.values.stride()[:2]
    early = early_launch(device)
    block_m = min(_QUERIES, power(max(16, group * tokens)))
    # Tiles of the same keys run next to each other: all but one find them in the chip's cache.
    _split_kernel[(triton.cdiv(group * tokens, block_m), programs)](
        query, *pages, k_new, v_new, table, counts, flags, bounds, *cold_tensors(stored, pages, counts), part_out,
        part_lse, shares, *strides, *table.stride()[:2], *cold_strides(stored), scale, softcap or 0.0, reach, batch,
        heads, slots, tokens, **sizes, DIM=dim, PAGE=page, MIN_SPLIT=_MIN_SPLIT, BLOCK_R=power(parts * batch * heads),
        BLOCK_M=block_m, BLOCK_N=tile["keys"], BLOCK_D=max(16, power(dim)), BLOCK_V=max(16, power(value_dim)),
        **cold_sizes(stored, tile, dim, page, device, query.element_size()), SOFTCAP=softcap is not None,
        UPCAST=INTERPRETING, **tile["options"], **early,
    )  # fmt: skip
    # Where all sequences are equally long, so many splits a row has; more take more turns.
    longest = max(slots, cold_slots)
    expected = -(-programs // (batch * max(1, most_kept // longest)))
    block_s = min(power(-(-longest // _MIN_SPLIT)), power(expected), _MERGED[0])
    block_v = min(max(16, power(value_dim)), _MERGED[0] * _MERGED[1] // block_s)
    merge_kernel[(tokens * group * triton.cdiv(value_dim, block_v), heads, batch)](
        part_out, part_lse, shares, counts, flags, out if s_aux is None else s_aux, out, tokens,
        **sizes, BLOCK_B=power(batch + 1), BLOCK_S=block_s, BLOCK_V=block_v, HAS_SINK=s_aux is not None,
        num_warps=2 if tokens == 1 else 4, **early,
    )  # fmt: skip
    if stored is not None and new is not None:
        launch_cool(pages, stored.cold, table, counts, bounds, stored.hot, stored.storage)
    return out


@lru_cache(maxsize=1024)
def _programs(rows, slots, wave):
    """Programs that share `slots` slots of `rows` rows: whole waves of them where that many find work."""
    waves = max(1, -(-slots // (wave * _MAX_SPLIT)), -(-2 * rows // wave))
    return min(waves * wave, rows + -(-slots // _MIN_SPLIT))


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
def _split_kernel(
    q, k_pages, v_pages, k_new, v_new, table, counts, flags, bounds, codes8, scales8, codes4, scales4, signs,
    cold_table, cold_counts, part_out, part_lse, shares,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_nkb, stride_nkh, stride_nkt, stride_nkd,
    stride_nvb, stride_nvh, stride_nvt, stride_nvd, stride_kp, stride_ks, stride_vp, stride_vs, stride_tb, stride_th,
    stride_cb, stride_ch, scale, softcap, reach, batch, heads, slots, tokens,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
    FUSED: tl.constexpr, HAS_FLAGS: tl.constexpr, MIN_SPLIT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    COLD: tl.constexpr, INT8: tl.constexpr, INT4: tl.constexpr, TURNED: tl.constexpr, BLOCK_C: tl.constexpr,
    PTX: tl.constexpr, WIDE: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    i_tile, i_program = tl.program_id(0), tl.program_id(1)
    PARTS: tl.constexpr = 2 if COLD else 1
    split, stops = shares_of(counts, cold_counts, bounds, batch, heads, slots, MIN_SPLIT, BLOCK_R, BLOCK_N, PAGE, COLD)
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
            first = (i_program - first_program) * split
            stop = tl.minimum(first + split, cold_count * PAGE)
            p_cold = cold_table + i_batch * stride_cb + i_head * stride_ch
            p_out, p_lse = part_out + part * VALUE_DIM, part_lse + part
            if INT8:  # noqa: SIM102 - a constant, and the other is not
                if bits == 8:
                    attend_cold(
                        b_q, codes8, scales8, signs, p_cold, first, stop, p_out, p_lse, asked, scale, softcap, 8, DIM,
                        VALUE_DIM, PAGE, TURNED, BLOCK_M, BLOCK_C, BLOCK_D, BLOCK_V, SOFTCAP, PTX, WIDE,
                    )  # fmt: skip
            if INT4:  # noqa: SIM102
                if bits == 4:
                    attend_cold(
                        b_q, codes4, scales4, signs, p_cold, first, stop, p_out, p_lse, asked, scale, softcap, 4, DIM,
                        VALUE_DIM, PAGE, TURNED, BLOCK_M, BLOCK_C, BLOCK_D, BLOCK_V, SOFTCAP, PTX, WIDE,
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
