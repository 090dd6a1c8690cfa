"""Tokens at any places of a text attend as the explicit mask says, in both implementations."""

import sys

import pytest
import torch
from paged_rows import DEVICE, GLOBAL
from redknot_kernels import NAMES, UNBOUNDED, HeadRules, attend_at, implementation

TEXT = 150
HEADS = [GLOBAL, (9, 3), (40, 0), (1, 5)]
PLACES = {
    "one": [70],
    "all": list(range(TEXT)),
    "runs": [0, 1, 2, 30, 31, 32, 33, 34, 35, 36, *range(90, 131), 149],
    "scattered": list(range(1, TEXT, 7)),
    "first": [0],
}


def oracle(query, keys, values, positions, heads, reach, scale, softcap=None, s_aux=None, dtype=torch.float64):
    """Attends under the mask that `heads` (window, sink) spell out."""
    query, keys, values = (x.to(dtype) for x in (query, keys, values))
    keys, values = (x.repeat_interleave(query.shape[1] // keys.shape[1], 1) for x in (keys, values))
    q, k = torch.tensor(positions)[:, None], torch.arange(keys.shape[2])[None]
    seen = torch.stack([(k <= q) & ((k > q - w) | (k < s)) & (k > q - reach) for w, s in heads])
    scores = query @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen.repeat_interleave(query.shape[1] // len(heads), 0), -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : keys.shape[2]] @ values).transpose(1, 2)


def check(
    name, positions, heads=HEADS, group=2, dims=(32, 32), dtype=torch.float32, batch=1, reach=UNBOUNDED, **extras
):
    if name == "triton":
        pytest.importorskip("triton")
    device = DEVICE if name == "triton" else "cpu"
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    rules = HeadRules.make(*zip(*heads, strict=True), page_size=16, reach=reach)
    query = 2 * make(batch, len(positions), len(heads) * group, dims[0]).transpose(1, 2)  # strided, as projections are
    keys, values = make(batch, len(heads), TEXT, dims[0]), make(batch, TEXT, len(heads), dims[1]).transpose(1, 2)
    where = torch.tensor(positions, device=device)
    on_device = {k: x.to(device) if torch.is_tensor(x) else x for k, x in extras.items()}
    inputs = (x.to(device) for x in (query, keys, values))
    out = implementation(name).attend_at(*inputs, where, rules, scale=0.2, **on_device).cpu()
    assert out.is_contiguous()
    exact = oracle(query, keys, values, positions, heads, reach, 0.2, **extras)
    mine = (out.double() - exact).abs().max()
    plain = oracle(query, keys, values, positions, heads, reach, 0.2, **extras, dtype=dtype)
    theirs = (plain.double() - exact).abs().max()
    assert mine <= 2 * theirs + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_every_token_sees_what_stands_before_it(name, places):
    check(name, PLACES[places])


@pytest.mark.parametrize(("queries", "span"), [(7, 1024), (256, 20), (3, 4), (1, 1)])
@pytest.mark.parametrize("places", PLACES)
def test_tokens_are_attended_in_chunks_of_what_stands_near(places, queries, span, monkeypatch):
    module = sys.modules["redknot_kernels.plain.attend_at"]
    monkeypatch.setattr(module, "_QUERIES", queries)
    monkeypatch.setattr(module, "_SPAN", span)
    check("torch", PLACES[places])
    check("torch", PLACES[places], softcap=3.0, reach=33)


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize(("dims", "dtype"), [((24, 40), torch.float32), ((80, 64), torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, dims, dtype, group):
    check(name, PLACES["runs"], group=group, dims=dims, dtype=dtype, batch=2)


@pytest.mark.parametrize(
    "extras",
    [
        {"reach": 20},
        {"reach": 2},
        {"softcap": 2.0},
        {"s_aux": torch.linspace(-1, 2, 8)},
        {"softcap": 3.0, "s_aux": torch.linspace(-1, 2, 8), "reach": 33},
        {"heads": [GLOBAL] * 3},
        {"heads": [(9, 30)] * 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_what_else_a_model_asks(name, extras):
    check(name, PLACES["runs"], **extras)


def test_heads_do_not_look_where_nothing_is_kept():
    """Garbage in the text, where no window reaches, changes nothing."""
    rules = HeadRules.make((4, 4), (1, 1), page_size=16)
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, 2, n, 16, generator=generator) for n in (5, 60, 60))
    positions = torch.arange(40, 45)
    want = attend_at(query, keys, values, positions, rules, scale=1.0)
    for x in (keys, values):
        x[:, :, 1:37] = 1e4
    assert torch.equal(attend_at(query, keys, values, positions, rules, scale=1.0), want)
