"""Writing tokens into pages, in Triton: all rows in one launch, and nothing waits for the host."""

from functools import lru_cache, wraps

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from ..rules import bounds_tensor

_PLACED = 32  # tokens that a program places


def on_its_device(function):
    """Lets a function launch its kernels where its first argument is: Triton takes the current device for it.

    Raises:
        ValueError: That is the CPU, and no interpreter runs the kernels.
    """

    @wraps(function)
    def there(first, *args, **kwargs):
        device = first.device
        if device.type == "cpu" and not INTERPRETING:
            raise ValueError("impl='triton' on a model on the CPU: move it to an accelerator, or pass impl='torch'")
        if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
            return function(first, *args, **kwargs)
        with torch.accelerator.device_index(device.index):
            return function(first, *args, **kwargs)

    return there


@on_its_device
def append_hot(pages, k_new, v_new, table, lengths, rules):
    """Writes a step's tokens behind the rows' ends, and lets nothing grow cold. Rows may be of any length."""
    batch, heads, tokens, dim = k_new.shape
    value_dim = v_new.shape[-1]
    block = 16 if tokens <= 16 else 64
    _append_kernel[(triton.cdiv(tokens, block), heads, batch)](
        *pages, k_new, v_new, table, lengths, rules.tensors(k_new.device),
        *pages.keys.stride()[:2], *pages.values.stride()[:2], *k_new.stride(), *v_new.stride(), *table.stride()[:2],
        tokens, heads, DIM=dim, VALUE_DIM=value_dim, PAGE=rules.page_size, BLOCK_T=block,
        BLOCK_D=triton.next_power_of_2(dim), BLOCK_V=triton.next_power_of_2(value_dim), num_warps=4,
        **early_launch(k_new.device),
    )  # fmt: skip


@on_its_device
def place_hot(pages, keys, values, table, rules, kept, span, rotation=None):
    """Continues the rows of one sequence with a stored span of tokens, and lets nothing grow cold."""
    (tokens, first, offset), dim, value_dim, power = span, keys.shape[1], values.shape[1], triton.next_power_of_2
    longest = max(min(window + sink, tokens) for window, sink in zip(*kept))
    if rotation is None:
        angles, pairs, interleaved = (keys, keys), 0, False  # not read
    else:
        angles, pairs = [x.contiguous() for x in rotation[:2]], rotation.cos.shape[1]
        interleaved = rotation.interleaved
    blocks = {"BLOCK_P": power(max(pairs, 1)), "BLOCK_R": power(max(dim - 2 * pairs, 1)), "BLOCK_V": power(value_dim)}
    _place_kernel[(triton.cdiv(longest, _PLACED), rules.heads)](
        *pages, keys, values, table, rules.tensors(keys.device), bounds_tensor(kept, keys.device), *angles,
        *keys.stride(), *values.stride(), table.stride(0), tokens, first, offset, rules.heads,
        DIM=dim, VALUE_DIM=value_dim, PAGE=rules.page_size, PAIRS=pairs, INTERLEAVED=interleaved, BLOCK_T=_PLACED,
        BLOCK_H=power(rules.heads), **blocks, num_warps=4, **early_launch(keys.device),
    )  # fmt: skip


@lru_cache(maxsize=64)
def early_launch(device):
    """Launch options that let a kernel be set up while the one before it still runs, for chips that can."""
    early = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def await_previous(EARLY: tl.constexpr):
    """Lets the next kernel be set up, and waits for all writes of the one before; every program must come here.

    A kernel that is done thus implies that all before it are, of which the next one may read.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["stride_tb", "stride_th", "tokens"])
def _append_kernel(
    k_pages, v_pages, k_new, v_new, table, lengths, bounds,
    stride_kp, stride_ks, stride_vp, stride_vs, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_tb, stride_th, tokens, heads,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    i_block, i_head, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + i_batch).to(tl.int32)
    sink, ring = tl.load(bounds + heads + i_head), tl.load(bounds + 2 * heads + i_head)
    token = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    position = length + token
    # What the step itself pushes out of the ring is not written: its slot belongs to a later token.
    kept = (token < tokens) & ((position < sink) | (position >= length + tokens - ring))
    slot = tl.where(position < sink, position, sink + (position - sink) % ring)
    batch = i_batch.to(tl.int64)
    page = tl.load(table + batch * stride_tb + i_head * stride_th + slot // PAGE, mask=kept, other=0).to(tl.int64)
    o_d, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    p_new = k_new + batch * stride_kb + i_head * stride_kh + token.to(tl.int64) * stride_kt
    mask = kept[:, None] & (o_d < DIM)
    b_k = tl.load(p_new[:, None] + o_d * stride_kd, mask=mask)
    tl.store((k_pages + page * stride_kp + slot % PAGE * stride_ks)[:, None] + o_d, b_k, mask=mask)
    p_new = v_new + batch * stride_vb + i_head * stride_vh + token.to(tl.int64) * stride_vt
    mask = kept[:, None] & (o_v < VALUE_DIM)
    b_v = tl.load(p_new[:, None] + o_v * stride_vd, mask=mask)
    tl.store((v_pages + page * stride_vp + slot % PAGE * stride_vs)[:, None] + o_v, b_v, mask=mask)


@triton.jit(do_not_specialize=["stride_th", "tokens", "first", "offset"])
def _place_kernel(
    k_pages, v_pages, keys, values, table, bounds, kept, cos, sin,
    stride_kt, stride_kd, stride_vt, stride_vd, stride_th, tokens, first, offset, heads,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    await_previous(EARLY)
    i_head, o_h = tl.program_id(1), tl.arange(0, BLOCK_H)
    # Stored are the first tokens and the last, or all; what is stored of the heads before comes first.
    before = o_h < i_head
    stored = tl.load(kept + o_h, mask=before, other=0) + tl.load(kept + heads + o_h, mask=before, other=0)
    start = tl.sum(tl.where(before, tl.minimum(stored, tokens), 0).to(tl.int64))
    count = tl.minimum(tl.load(kept + i_head) + tl.load(kept + heads + i_head), tokens)
    firsts = tl.where(count < tokens, tl.load(kept + heads + i_head), 0)
    i = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.where(i < firsts, i, i + tokens - count)
    position = offset + token
    sink, ring = tl.load(bounds + heads + i_head), tl.load(bounds + 2 * heads + i_head)
    since = offset + tl.maximum(tl.where(count < tokens, firsts + tokens - count, 0), tokens - ring)
    used = (i < count) & (token >= first) & ((position < sink) | (position >= since))
    slot = tl.where(position < sink, position, sink + (position - sink) % ring)
    page = tl.load(table + i_head * stride_th + slot // PAGE, mask=used, other=0).to(tl.int64)
    place = page * PAGE + slot % PAGE
    stored = start + i
    p_from, p_to = (keys + stored * stride_kt)[:, None], (k_pages + place * DIM)[:, None]
    if PAIRS > 0:
        o_p = tl.arange(0, BLOCK_P)
        mask = used[:, None] & (o_p < PAIRS)
        b_cos = tl.load(cos + token[:, None] * PAIRS + o_p, mask=mask, other=0.0)
        b_sin = tl.load(sin + token[:, None] * PAIRS + o_p, mask=mask, other=0.0)
        o_a = 2 * o_p if INTERLEAVED else o_p
        o_b = o_a + 1 if INTERLEAVED else o_p + PAIRS
        b_a = tl.load(p_from + o_a * stride_kd, mask=mask, other=0.0).to(tl.float32)
        b_b = tl.load(p_from + o_b * stride_kd, mask=mask, other=0.0).to(tl.float32)
        kind = k_pages.dtype.element_ty
        tl.store(p_to + o_a, (b_a * b_cos - b_b * b_sin).to(kind), mask=mask)
        tl.store(p_to + o_b, (b_b * b_cos + b_a * b_sin).to(kind), mask=mask)
    if 2 * PAIRS < DIM:
        o_r = 2 * PAIRS + tl.arange(0, BLOCK_R)
        mask = used[:, None] & (o_r < DIM)
        tl.store(p_to + o_r, tl.load(p_from + o_r * stride_kd, mask=mask), mask=mask)
    o_v = tl.arange(0, BLOCK_V)
    mask = used[:, None] & (o_v < VALUE_DIM)
    b_v = tl.load((values + stored * stride_vt)[:, None] + o_v * stride_vd, mask=mask)
    tl.store((v_pages + place * VALUE_DIM)[:, None] + o_v, b_v, mask=mask)


INTERPRETING = isinstance(_append_kernel, InterpretedFunction)
