"""Turning keys by angles: what moves a stored key, rotary embedding and all, to another position."""

from typing import NamedTuple

import torch


class Rotation(NamedTuple):
    """How far the keys of each token turn: one angle for every pair of dimensions.

    Dimensions behind the `2 * pairs` first ones stay as they are.

    Attributes:
        cos, sin: Of the angles, `[tokens, pairs]`, or `[batch, tokens, pairs]`, in float32.
        interleaved: Pairs are neighbours, `(0, 1), (2, 3), ...`, and not `(0, pairs), (1, pairs + 1), ...`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


def rotate(
    keys, rotation
):  # [..., tokens, dim] -> the same; [batch, heads, tokens, dim] with angles for each sequence
    """Turns keys, in float32 and with one rounding to their own type; by an angle of 0 they stay what they are."""
    cos, sin, interleaved = rotation
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    turned = keys.float()
    used = turned.narrow(-1, 0, 2 * cos.shape[-1])
    a, b = used.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else used.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    used = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    rest = turned[..., used.shape[-1] :]
    return torch.cat((used, rest), -1).to(keys.dtype)
