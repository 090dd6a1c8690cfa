"""Cold pages as tensor cores take them, in Triton: read in words, and nothing moves from thread to thread.

A tensor core wants of every row that is summed over four numbers in each of four threads, then the next four in each,
and does not mind in which order a sum is taken. So four threads read a row, up to 16 bytes each, and what each thread
holds is summed in the order in which it holds it. Tiles of words are `[4 threads, 8 rows, warps, more rows, chunks,
words]`, in which Triton leaves them where they are; what is multiplied with them is read in the same order.
"""

import triton
import triton.language as tl


def _fp16_of(masked):
    """PTX that makes fp16 of the four bytes of a word: of a number so many times the least fp16 above zero."""
    return tl.constexpr(f"""{{
        .reg .b32 low, high;
        prmt.b32 low, $4, 0, 0x4140;
        prmt.b32 high, $4, 0, 0x4342;
        {masked}
        mov.b32 {{$0, $1}}, low;
        mov.b32 {{$2, $3}}, high;
        }}""")


_WHOLE = _fp16_of("")
_LOW = _fp16_of("and.b32 low, low, 0x000F000F; and.b32 high, high, 0x000F000F;")
_HIGH = _fp16_of("and.b32 low, low, 0x00F000F0; and.b32 high, high, 0x00F000F0;")


@triton.jit
def _four(b_word, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,r", [b_word], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1
    )


@triton.jit
def numbers(b_word, BITS: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr):
    """Codes `[warps, rows, summed]`: whole bytes, or their low halves, or the high ones, which count 16 times.

    Through PTX they are so many times the least fp16 above zero, else just so many.
    """
    if PTX:
        if BITS == 8:
            b_0, b_1, b_2, b_3 = _four(b_word, _WHOLE)
        elif HALF == 0:
            b_0, b_1, b_2, b_3 = _four(b_word, _LOW)
        else:
            b_0, b_1, b_2, b_3 = _four(b_word, _HIGH)
    else:
        MASK: tl.constexpr = 255 if BITS == 8 else 15 << (4 * HALF)
        b_0, b_1, b_2, b_3 = b_word & MASK, (b_word >> 8) & MASK, (b_word >> 16) & MASK, (b_word >> 24) & MASK
    b_x = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    b_x = b_x.to(tl.float32) if WIDE else b_x.to(tl.float16)
    WARPS: tl.constexpr = b_word.shape[2]
    MORE: tl.constexpr = b_word.shape[3]
    WORDS: tl.constexpr = b_word.shape[4] * b_word.shape[5]
    b_x = tl.permute(tl.reshape(b_x, 4, 8, WARPS, MORE, WORDS, 4), 2, 3, 1, 4, 0, 5)
    return tl.reshape(b_x, WARPS, MORE * 8, WORDS * 16)


@triton.jit
def scales_of(b_word, WIDE: tl.constexpr):
    """Scales `[warps, 8, summed]` of words of two fp16, in the order of `numbers`."""
    b_low = (b_word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    b_high = ((b_word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    WARPS: tl.constexpr = b_word.shape[2]
    PAIRS: tl.constexpr = b_word.shape[4] * b_word.shape[5]
    b_x = tl.reshape(tl.join(b_low, b_high), 4, 8, WARPS, PAIRS // 2, 4)
    b_x = tl.reshape(tl.permute(b_x, 2, 1, 3, 0, 4), WARPS, 8, PAIRS * 8)
    return b_x.to(tl.float32) if WIDE else b_x


@triton.jit
def order_of(BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """Where in its row stands what `numbers` puts first, second and so on; a thread holds so many words a chunk."""
    o = tl.arange(0, BLOCK)
    return o // (16 * WORDS) * (16 * WORDS) + o % (16 * WORDS) // 16 * 4 + o // 4 % 4 * (4 * WORDS) + o % 4


@triton.jit
def in_order(b_p):
    """Columns `[warps, rows, columns]` of a product, as its threads hold them, in the order of `numbers`."""
    WARPS: tl.constexpr = b_p.shape[0]
    ROWS: tl.constexpr = b_p.shape[1]
    COLUMNS: tl.constexpr = b_p.shape[2]
    b_p = tl.permute(tl.reshape(b_p, WARPS, ROWS, COLUMNS // 16, 2, 4, 2), 0, 1, 2, 4, 3, 5)
    return tl.reshape(b_p, WARPS, ROWS, COLUMNS)


@triton.jit
def of_warps(b_x):
    """Something of every warp, beside tiles of words."""
    return b_x[None, None, :, None, None, None]


@triton.jit
def _spread(o_thread, o_row, o_warp, o_more, o_chunk, o_word):
    rows = o_thread[:, None, None, None] + o_row[None, :, None, None] + o_warp[None, None, :, None] + o_more
    return rows[:, :, :, :, None, None] + (o_chunk[:, None] + o_word)


@triton.jit
def _read(p, o_row, o_word, mask, ROW: tl.constexpr, ITEMS: tl.constexpr, MASKED: tl.constexpr):
    """Words of so many items, in rows of so many; what does not lie on whole words is put together."""
    if ROW % ITEMS == 0:
        p_word = p.to(tl.pointer_type(tl.int32)) + (o_row * (ROW // ITEMS) + o_word)
        b_word = tl.load(p_word, mask=mask, other=0) if MASKED else tl.load(p_word)
    else:
        p_item = p.to(tl.pointer_type(tl.uint8 if ITEMS == 4 else tl.uint16)) + (o_row * ROW + o_word * ITEMS)
        b_word = tl.load(p_item, mask=mask, other=0).to(tl.int32)
        for i in tl.static_range(1, ITEMS):
            b_word |= tl.load(p_item + i, mask=mask, other=0).to(tl.int32) << (32 // ITEMS * i)
    return b_word


@triton.jit
def read_keys(p_keys, b_part, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Words of keys, `DIM` bytes each, of every warp's part of its page.

    They lie so that the thread that holds a token's score holds its values.
    """
    WORDS: tl.constexpr = min(4, BLOCK // 16)
    o_t, o_r, o_w, o_0 = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, b_part.shape[0]), tl.arange(0, 1)
    o_chunk = tl.arange(0, BLOCK // (16 * WORDS)) * (4 * WORDS)
    o_word = _spread(o_t * WORDS, o_r * 0, o_w * 0, o_0, o_chunk, tl.arange(0, WORDS))
    o_token = o_r // 2 * (BLOCK_C // 4) + o_r % 2
    o_token = _spread(o_t * 0, o_token, b_part * BLOCK_C, tl.arange(0, BLOCK_C // 8) * 2, o_0, o_0)
    return _read(p_keys, o_token, o_word, o_word * 4 < DIM, DIM, 4, DIM < BLOCK)


@triton.jit
def read_values(p_values, b_part, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
                PAGE: tl.constexpr):  # fmt: skip
    """Words of values, channel by channel, of every warp's part of its page."""
    WORDS: tl.constexpr = BLOCK_C // 16
    o_t, o_r, o_w, o_0 = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, b_part.shape[0]), tl.arange(0, 1)
    o_word = _spread(o_t * WORDS, o_r * 0, b_part * (BLOCK_C // 4), o_0, o_0, tl.arange(0, WORDS))
    o_channel = _spread(o_t * 0, o_r, o_w * 0, tl.arange(0, BLOCK // 8) * 8, o_0, o_0)
    return _read(p_values, o_channel, o_word, o_channel < DIM, PAGE, 4, DIM < BLOCK)


@triton.jit
def read_scales(p_scales, b_first, ROW: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
                WORDS: tl.constexpr):  # fmt: skip
    """Words of the fp16 of every warp's page that go with a row of codes, of which a thread holds so many a chunk.

    They are read for each of 8 rows. `ROW` counts what stands before them in rows of `COUNT`, `b_first` in words.
    """
    WIDTH: tl.constexpr = min(4, 2 * WORDS)
    PARTS: tl.constexpr = 2 * WORDS // WIDTH
    o_t, o_r, o = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, BLOCK // (16 * WORDS) * PARTS)
    o_chunk = o // PARTS * (8 * WORDS) + o % PARTS * WIDTH
    o_word = _spread(o_t * (2 * WORDS), o_r * 0, b_first, tl.arange(0, 1), o_chunk, tl.arange(0, WIDTH))
    return _read(p_scales, ROW, o_word, o_word * 2 < COUNT, COUNT, 2, COUNT < BLOCK)
