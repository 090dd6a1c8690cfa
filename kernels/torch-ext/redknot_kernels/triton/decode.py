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

from ..plain.cold import Cold
from ..plain.pages import Pages
from ..plain.quantise import ColdPages
from .cold import MOST_ROWS, Stored, cold_sizes, cold_strides, cold_tensors, stored_rows
from .configurations import chip_name, configuration, processors
from .merging import merge_and_cool_kernel, merge_kernel
from .pages import INTERPRETING, early_launch, on_its_device
from .quantise import launch_cool, sizes_of
from .splitting import split_kernel

# The fewest slots of a split, and about the most: long ones leave the chip idle where programs end unevenly.
_MIN_SPLIT = 64
_MAX_SPLIT = 2048
# The most queries of a program, tokens times heads of the group: more need more registers and shared memory.
_QUERIES = 64
# The most new tokens of a launch, and the bytes of their keys: a program holds them all at once.
_NEW = 64, 16 << 10
# The most splits a program merges at once, and with them as many value channels: a merge is a matter of latency.
_MERGED = 256, 16
# Warps of a program that merges where pages grow cold: a page takes more registers than a merge.
_COOLING = 4


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
    """Runs both kernels, and for stored rows the one that lets pages grow cold; one token has it done by the second.

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
    shares = torch.empty(2 if stored is None else 3, batch * heads, dtype=torch.int32, device=device)
    k_new, v_new, real = new or (query, query, None)
    flags = counts if real is None else real.contiguous()
    sizes = {"GROUP": group, "VALUE_DIM": value_dim, "FUSED": new is not None}
    sizes |= {"HAS_FLAGS": real is not None, "BLOCK_T": max(16, power(tokens))}
    strides = *query.stride(), *k_new.stride(), *v_new.stride(), *pages.keys.stride()[:2], *pages.values.stride()[:2]
    early = early_launch(device)
    cold = cold_sizes(stored, tile, dim, page, device, query.element_size(), group * tokens)
    block_m = min(_QUERIES if stored is None else MOST_ROWS, power(max(16, group * tokens)))
    # Tiles of the same keys run next to each other: all but one find them in the chip's cache.
    split_kernel[(triton.cdiv(group * tokens, block_m), programs)](
        query, *pages, k_new, v_new, table, counts, flags, bounds, *cold_tensors(stored, pages, counts), part_out,
        part_lse, shares, *strides, *table.stride()[:2], *cold_strides(stored), scale, softcap or 0.0, reach, batch,
        heads, slots, tokens, **sizes, DIM=dim, PAGE=page, MIN_SPLIT=_MIN_SPLIT, BLOCK_R=power(parts * batch * heads),
        BLOCK_M=block_m, BLOCK_N=tile["keys"], BLOCK_D=max(16, power(dim)), BLOCK_V=max(16, power(value_dim)),
        **cold, SOFTCAP=softcap is not None, UPCAST=INTERPRETING, **tile["options"], **early,
    )  # fmt: skip
    # Where all sequences are equally long, so many splits a row has; more take more turns.
    longest = max(slots, cold_slots)
    expected = -(-programs // (batch * max(1, most_kept // longest)))
    block_s = min(power(-(-longest // _MIN_SPLIT)), power(expected), _MERGED[0])
    block_v = min(max(16, power(value_dim)), _MERGED[0] * _MERGED[1] // block_s)
    sizes |= {"BLOCK_B": power(batch + 1), "BLOCK_S": block_s, "BLOCK_V": block_v, "HAS_SINK": s_aux is not None}
    merged = part_out, part_lse, shares, counts, flags, out if s_aux is None else s_aux, out, tokens
    grid = tokens * group * triton.cdiv(value_dim, block_v), heads, batch
    cools = stored is not None and new is not None
    if cools and batch * tokens == 1:
        _merge_and_cool(grid, merged, pages, table, counts, bounds, stored, **sizes, **early)
        return out
    merge_kernel[grid](*merged, **sizes, num_warps=2 if tokens == 1 else 4, **early)
    if cools:
        launch_cool(pages, stored.cold, table, counts, bounds, stored.hot, stored.storage)
    return out


def _merge_and_cool(grid, merged, pages, table, counts, bounds, stored, **sizes):
    """Launches the second kernel with one more program a row, which lets its pages grow cold.

    It saves a launch, but takes more registers and shared memory than merging alone: more programs than run at once
    took longer so.
    """
    of = sizes_of(pages)
    cooled = {"DIM": of["DIM"], "PAGE": of["PAGE"], "TURNED": of["TURNED"], "COOL_D": of["BLOCK_D"]}
    merge_and_cool_kernel[(grid[0] + 1, *grid[1:])](
        *merged, *pages, table, bounds, *cold_tensors(stored, pages, counts), *pages.keys.stride()[:2],
        *pages.values.stride()[:2], *table.stride()[:2], *cold_strides(stored), stored.hot, **sizes, **cooled,
        COOL_V=of["BLOCK_V"], INT8=8 in stored.storage, INT4=4 in stored.storage, UPCAST=INTERPRETING,
        num_warps=_COOLING,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _programs(rows, slots, wave):
    """Programs that share `slots` slots of `rows` rows: whole waves of them where that many find work."""
    waves = max(1, -(-slots // (wave * _MAX_SPLIT)), -(-2 * rows // wave))
    return min(waves * wave, rows + -(-slots // _MIN_SPLIT))
