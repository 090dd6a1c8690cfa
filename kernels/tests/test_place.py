"""Stored spans go to their places in the rows, and their keys turn on the way."""

import pytest
import torch
from paged_rows import DEVICE
from redknot_kernels import NAMES, UNBOUNDED, HeadRules, Pages, Rotation, implementation, rotate

PAGE, COLUMNS = 16, 9


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


RULES = HeadRules.make((UNBOUNDED, 3, 20, UNBOUNDED, 1), (0, 2, 0, 0, 5), PAGE)
KEPT = {
    "as the rules say": (RULES.window, RULES.sink),
    "more": ((UNBOUNDED, 30, 20, UNBOUNDED, 8), (0, 2, 4, 0, 9)),
    "all": ((UNBOUNDED,) * 5, (0,) * 5),
}


def stored_tokens(kept, tokens):
    """What is stored of a span, head by head."""
    return [
        (head, token)
        for head, (window, sink) in enumerate(zip(*kept, strict=True))
        for token in range(tokens)
        if token < sink or token >= tokens - window
    ]


def place_by_hand(pages, keys, values, table, kept, span):
    """Writes what a row keeps token by token, into copies of the pages."""
    tokens, first, offset = span
    pages = [x.clone() for x in pages]
    stored = stored_tokens(kept, tokens)
    known = set(stored)
    for i, (head, token) in enumerate(stored):
        position, sink, ring = offset + token, RULES.sink[head], RULES.ring[head]
        unbroken = all((head, later) in known for later in range(token, tokens))
        in_ring = unbroken and tokens - token <= ring
        if token >= first and (position < sink or in_ring):
            slot = position if position < sink else sink + (position - sink) % ring
            for half, new in zip(pages, (keys, values), strict=True):
                half[table[head, slot // PAGE], slot % PAGE] = new[i].to(half.dtype)
    return pages


@pytest.mark.pairs
@pytest.mark.parametrize("span", [(70, 0, 0), (70, 7, 33), (9, 3, 2), (1, 0, 60), (1, 0, 0), (40, 39, 100)], ids=str)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("dims", "pairs", "interleaved"),
    [((64, 64), 32, False), ((80, 96), 16, False), ((24, 40), 12, True), ((32, 16), 3, True), ((192, 128), 0, False)],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_a_span_goes_to_its_rows_and_turns(name, dims, pairs, interleaved, dtype, kept, span):
    if name == "triton":
        pytest.importorskip("triton")
    device = DEVICE if name == "triton" else "cpu"
    table = torch.randperm(5 * COLUMNS, generator=torch.Generator().manual_seed(span[2])).int().view(5, COLUMNS)
    pages = [numbers(5 * COLUMNS, PAGE, d, seed=3, dtype=dtype) for d in dims]
    stored = stored_tokens(KEPT[kept], span[0])
    keys, values = numbers(len(stored), dims[0], dtype=dtype), numbers(dims[1], len(stored), dtype=dtype).T
    angles = 100 * numbers(span[0], max(pairs, 1), seed=1).double()
    turns = rotation(angles, interleaved) if pairs else None
    token = torch.tensor([token for _, token in stored])
    moved = turned(keys, angles[token], interleaved) if pairs else keys
    wanted = place_by_hand(pages, moved, values, table, KEPT[kept], span)
    where = [x.to(device) for x in (*pages, keys, values, table)]
    if turns is not None:
        turns = Rotation(turns.cos.to(device), turns.sin.to(device), interleaved)
    implementation(name).place(Pages(*where[:2]), *where[2:], RULES, KEPT[kept], span, turns)
    assert torch.equal(where[1].cpu(), wanted[1])
    found, exact = where[0].cpu(), wanted[0]
    untouched = (wanted[0] == pages[0]).all(-1)
    assert torch.equal(found[untouched], exact[untouched])
    step = torch.finfo(dtype).eps  # float32 may fall on the other side of a half, when rounded
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=step if pairs else 0)
