"""Stored tokens go to their places in the pages, and their keys turn on the way."""

import pytest
import torch
from paged_rows import DEVICE
from redknot_kernels import NAMES, Rotation, implementation, rotate

PAGES, PAGE, STORED = 9, 16, 70


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def turned(keys, angles, interleaved):
    """Every pair as a complex number, multiplied by one of length 1, in float64."""
    used, rest = keys.double().split([2 * angles.shape[1], keys.shape[1] - 2 * angles.shape[1]], 1)
    a, b = (used[:, 0::2], used[:, 1::2]) if interleaved else used.tensor_split(2, 1)
    pairs = torch.complex(a, b) * torch.complex(angles.cos(), angles.sin())
    moved = torch.stack([pairs.real, pairs.imag], 2 if interleaved else 1).flatten(1)
    return torch.cat([moved, rest], 1)


def rotation(angles, interleaved):
    return Rotation(angles.cos().float(), angles.sin().float(), interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("pairs", [16, 12, 1])
def test_pairs_turn_as_complex_numbers(pairs, interleaved):
    keys, angles = numbers(50, 32), 100 * numbers(50, pairs, seed=1).double()
    turns = rotation(angles, interleaved)
    torch.testing.assert_close(rotate(keys, turns).double(), turned(keys, angles, interleaved), atol=1e-6, rtol=0)
    assert torch.equal(rotate(keys.bfloat16(), rotation(0 * angles, interleaved)), keys.bfloat16())
    batch = Rotation(turns.cos.view(2, 25, -1), turns.sin.view(2, 25, -1), interleaved)
    by_sequence = rotate(keys.view(2, 1, 25, 32).expand(2, 3, 25, 32), batch)
    assert torch.equal(by_sequence[:, 2].reshape(50, 32), rotate(keys, turns))


@pytest.mark.parametrize(
    ("dtype", "tokens"), [(torch.float32, 1), (torch.float32, 61), (torch.bfloat16, 32), (torch.float16, 0)], ids=str
)
@pytest.mark.parametrize(
    ("dims", "pairs", "interleaved"),
    [((64, 64), 32, False), ((80, 96), 16, False), ((24, 40), 12, True), ((32, 16), 3, True), ((192, 128), 0, False)],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_placed_and_turned(name, dims, pairs, interleaved, dtype, tokens):
    if name == "triton":
        pytest.importorskip("triton")
    device = DEVICE if name == "triton" else "cpu"
    pages = [numbers(PAGES, PAGE, d, seed=3, dtype=dtype) for d in dims]
    keys, values = numbers(STORED, dims[0], dtype=dtype), numbers(dims[1], STORED, dtype=dtype).T
    order = torch.Generator().manual_seed(tokens)
    source = torch.randint(STORED, (tokens,), generator=order)
    target = torch.randperm(PAGES * PAGE, generator=order)[:tokens]
    turn, angles = torch.randint(5, (tokens,), generator=order), 100 * numbers(5, max(pairs, 1), seed=1).double()
    turns = rotation(angles, interleaved) if pairs else None
    wanted = [x.clone().view(-1, d) for x, d in zip(pages, dims, strict=True)]
    wanted[1][target] = values[source]
    moved = turned(keys[source], angles[turn], interleaved) if pairs else keys[source]
    wanted[0][target] = moved.to(dtype)
    where = [x.to(device) for x in (*pages, keys, values, source, target)]
    if turns is not None:
        turns = Rotation(turns.cos.to(device), turns.sin.to(device), interleaved)
    implementation(name).place(*where, turns, turn.to(device) if pairs else None)
    assert torch.equal(where[1].cpu().view(-1, dims[1]), wanted[1])
    found, exact = where[0].cpu().view(-1, dims[0]), wanted[0]
    others = torch.ones(len(found), dtype=torch.bool).index_fill(0, target, False)
    assert torch.equal(found[others], exact[others])
    step = torch.finfo(dtype).eps  # float32 may fall on the other side of a half, when rounded
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=step if pairs else 0)
