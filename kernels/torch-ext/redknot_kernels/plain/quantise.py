"""Pages in 8 and 4 bits: how one is made, and how it is read.

Keys have a scale and a zero for each channel of a page, values for each token, in fp16. In 4 bits keys are turned by a
Hadamard matrix over the head dim first, which spreads what stands out in single channels, and a byte holds two
channels: of the low half of the dim, and of the high.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

# The largest finite fp16, and the smallest one above zero.
_MOST, _LEAST = 65504.0, 2.0**-24
# Behind the scales stands the factor of those of the values; the rest of it keeps pages aligned.
TAIL = 8


class ColdPages(NamedTuple):
    """A pool of pages in so many bits.

    Attributes:
        codes: `[pages, bytes]` of uint8: keys `[page_size, dim]`, then values the other way, `[value dim, page_size]`;
            in 4 bits half as many bytes, with `dim / 2` in place of dim.
        scales: `[pages, 2 * (dim + page_size) + 8]` of fp16: scales of the keys' channels, their zeros, scales of the
            values' tokens as shares of a power of two, their zeros, and that power of two.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def cold_pool(pages, bits, page_size, dims, device):
    """Empty cold pages; `dims` are those of a key and of a value.

    Raises:
        ValueError: Dims are odd, and two channels of 4 bits share a byte.
    """
    if bits == 4 and any(dim % 2 for dim in dims):
        raise ValueError(f"int4 pages hold two channels a byte, and the head dims are {dims}: use int8")
    codes = torch.zeros(pages, page_size * sum(dims) * bits // 8, dtype=torch.uint8, device=device)
    scales = torch.zeros(pages, 2 * (dims[0] + page_size) + TAIL, dtype=torch.float16, device=device)
    return ColdPages(codes, scales)


def quantise_page(keys, values, bits):  # [..., page_size, dim], [..., page_size, value dim]
    """Codes `[..., bytes]` and scales of full pages, as `ColdPages` holds them."""
    keys, values = keys.float(), values.float()
    if bits == 4:
        keys = keys @ turn(keys.shape[-1], keys.device)
    key_codes, key_scale, key_zero = _codes(keys, bits, -2)
    scale = (values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)) / (2**bits - 1)
    top = scale.amax(-2, keepdim=True).clamp(_LEAST, _MOST / 2)
    top = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent.clamp(min=-14))  # the next power of two
    value_codes, value_scale, value_zero = _codes(values, bits, -1, top)
    codes = torch.cat([_packed(key_codes, bits).flatten(-2), _packed(value_codes, bits).mT.flatten(-2)], -1)
    tail = torch.nn.functional.pad(top.flatten(-2), (0, TAIL - 1))
    scales = [x.flatten(-2) for x in (key_scale, key_zero, value_scale, value_zero)]
    return codes, torch.cat([*scales, tail], -1).half()


def dequantise_page(codes, scales, bits, page_size, dims):
    """Keys `[..., page_size, dim]` and values `[..., page_size, value dim]` of cold pages, in float32."""
    dim, value_dim = dims
    parts = scales.float().split([dim, dim, page_size, page_size, TAIL], -1)
    key_scale, key_zero, value_scale, value_zero, tail = parts
    stored = codes.split([page_size * dim * bits // 8, page_size * value_dim * bits // 8], -1)
    keys = _unpacked(stored[0].unflatten(-1, (page_size, -1)), bits)
    values = _unpacked(stored[1].unflatten(-1, (-1, page_size)).mT, bits)
    keys = keys * key_scale.unsqueeze(-2) + key_zero.unsqueeze(-2)
    value_scale = value_scale * tail[..., :1]
    values = values * value_scale.unsqueeze(-1) + value_zero.unsqueeze(-1)
    return (keys @ turn(dim, keys.device) if bits == 4 else keys), values


@lru_cache(maxsize=64)
def turn(dim, device):
    """The orthonormal, symmetric Hadamard matrix `[dim, dim]`, in blocks where the dim is no power of two."""
    block = turned_block(dim)
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / block**0.5] * (dim // block))


def turned_block(dim):
    """Channels that are turned together: the largest power of two that divides the dim."""
    return dim & -dim


def _codes(x, bits, over, top=None):
    """Codes, and in fp16's values scale and zero: over tokens for keys, over channels for values (shares of `top`)."""
    low, high = x.amin(over, keepdim=True), x.amax(over, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    scale = (scale if top is None else scale / top).clamp(_LEAST, _MOST).half().float()
    zero = low.clamp(-_MOST, _MOST).half().float()
    step = scale if top is None else scale * top
    return torch.floor((x - zero) / step + 0.5).clamp(0, 2**bits - 1).to(torch.uint8), scale, zero


def _packed(codes, bits):  # [..., dim] -> [..., bytes]
    if bits == 8:
        return codes
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def _unpacked(codes, bits):
    return (codes if bits == 8 else torch.cat([codes & 15, codes >> 4], -1)).float()
