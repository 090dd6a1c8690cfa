"""The Triton kernel of texts whose pages grow cold while they are read, held against softmax over what is seen."""

import pytest
import torch

pytest.importorskip("triton")

from redknot_kernels import implementation
from redknot_kernels.triton import in_chunks as triton_in_chunks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK, HOT = 48, 20
SMALL = {"rows": 16, "keys": 16, "options": {"num_warps": 4, "num_stages": 1}}


def ends_of(places, page):
    return [page * (1 + max((place // CHUNK * CHUNK - HOT) // page - 1, 0)) for place in places]


def oracle(query, key, value, cold, places, page, scale, softcap=None, s_aux=None):
    """Every query alone, in float64."""
    group, out = query.shape[1] // key.shape[1], []
    key, value, *cold = (x.double().repeat_interleave(group, 1) for x in (key, value, *cold))
    for i, (place, end) in enumerate(zip(places, ends_of(places, page), strict=True)):
        keys, values = (x.clone()[:, :, : place + 1] for x in (key, value))
        for mine, theirs in ((keys, cold[0]), (values, cold[1])):
            mine[:, :, page:end] = theirs[:, :, page : min(end, place + 1)]
        scores = (query[:, :, i, None].double() @ keys.mT)[:, :, 0] * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.double()[None, :, None].expand(len(scores), -1, 1)], -1)
        weights = scores.softmax(-1)[..., : place + 1]
        out.append((weights[:, :, None] @ values)[:, :, 0])
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    ("places", "page", "dims", "group", "options"),
    [
        (range(30, 110), 32, (24, 40), 3, {}),
        ((0, 3, 3, 40, 47, 48, 95, 96, 97, 130, 199), 8, (16, 16), 1, {}),
        ((5, 60, *range(100, 190, 7)), 16, (32, 16), 4, {"softcap": 2.0}),
        (range(3, 120, 2), 16, (16, 32), 2, {"s_aux": torch.linspace(-1, 2, 4)}),
    ],
    ids=["whole", "some", "softcap", "sink"],
)
def test_every_query_sees_what_its_chunk_found(places, page, dims, group, options, monkeypatch):
    monkeypatch.setattr(triton_in_chunks, "configuration", lambda *_: SMALL)
    generator = torch.Generator().manual_seed(0)
    tokens, heads, places = max(places) + 1, 2, list(places)
    shapes = [(len(places), heads * group, dims[0]), *((tokens, heads, dim) for dim in (*dims, *dims))]
    new = [torch.randn(2, *shape, generator=generator).transpose(1, 2) for shape in shapes]  # strided, as projections
    query, key, value, *cold = new
    expected = oracle(query, key, value, cold, places, page, 0.3, **options)
    numbers = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (places, ends_of(places, page))]
    on_device = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()}
    query, key, value, *cold = (x.to(DEVICE) for x in new)
    assert implementation("triton").in_chunks is triton_in_chunks.in_chunks
    found = triton_in_chunks.in_chunks(query, key, value, cold, *numbers, page, scale=0.3, **on_device)
    assert found.is_contiguous()
    torch.testing.assert_close(found.cpu().double(), expected, atol=3e-6, rtol=1e-5)
