"""How the programs of a launch share the slots of all rows, in Triton."""

import triton
import triton.language as tl


@triton.jit
def shares_of(
    counts, cold_counts, bounds, batch, heads, slots, MIN_SPLIT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Slots of a split, those of every row, and the program behind its last; each row has at least one.

    With cold pages each row counts as two: first its cold pages, which may have no program, then the others. Their
    splits are whole turns of so many slots; 0 where no row has cold pages.
    """
    PARTS: tl.constexpr = 2 if TURN > 0 else 1
    o_p = tl.arange(0, BLOCK_R)
    o_r, row = o_p // PARTS, o_p < PARTS * batch * heads
    length = tl.load(counts + o_r // heads, mask=row, other=0).to(tl.int32)
    sink = tl.load(bounds + heads + o_r % heads, mask=row, other=0)
    ring = tl.load(bounds + 2 * heads + o_r % heads, mask=row, other=0)
    used = tl.minimum(tl.minimum(length, sink + ring), slots)
    least = tl.where(row, 1, 0)
    if TURN > 0:
        is_cold = o_p % PARTS == 0
        used = tl.where(is_cold, tl.load(cold_counts + o_r, mask=row, other=0) * PAGE, used)
        least = tl.where(is_cold, 0, least)
    spare = tl.num_programs(1) - PARTS * batch * heads  # a row's last split may be short
    split = tl.cdiv(tl.cdiv(tl.sum(used, 0), tl.maximum(spare, 1)), BLOCK_N) * BLOCK_N
    split = tl.maximum(split, MIN_SPLIT)
    splits = tl.cdiv(used, split)
    if TURN > 0:
        splits = tl.where(is_cold, tl.cdiv(used, tl.cdiv(split, TURN) * TURN), splits)
    splits = tl.where(row, tl.maximum(splits, least), 0)
    return split, used, tl.cumsum(splits, 0)
