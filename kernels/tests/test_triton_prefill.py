"""The Triton kernel of prefill, held against the same oracle as its plain twin, and against the twin."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from paged_rows import GLOBAL, HEADS, Rows, oracle
from redknot_kernels import Pages, append, read_context
from redknot_kernels import prefill as plain_prefill

pytest.importorskip("triton")

from redknot_kernels.triton import prefill as triton_prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"rows": 32, "keys": 16, "options": {"num_warps": 4, "num_stages": 1}}
STEPS = {"prompt": (45, 1), "chunks": (5, 51, 1, 17), "short": (1, 2, 3)}
EXTRAS = {
    "softcap": {"softcap": 2.0},
    "s_aux": {"s_aux": torch.linspace(-1, 2, 8)},
    "both": {"softcap": 3.0, "s_aux": torch.linspace(-1, 2, 8)},
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles small enough for short sequences to have edges and insides."""
    monkeypatch.setattr(triton_prefill, "configuration", lambda *_: SMALL)


@pytest.fixture(params=[1, 3], ids="parts{}".format)
def parts(request, monkeypatch):
    """The number of parts into which the keys of every query are split."""
    monkeypatch.setattr(triton_prefill, "_parts", lambda *_: request.param)


def step(rows, tokens, group, **kwargs):
    """Attends a step of `tokens` with the kernel; `rows.twin` and `rows.oracle` say what it should give."""
    batch, heads, length, dim = rows.keys.shape
    sizes = (heads * group, dim), (heads, dim), (heads, rows.values.shape[-1])
    new = [torch.randn(batch, tokens, *size, generator=rows.generator).to(rows.keys.dtype) for size in sizes]
    query, k_new, v_new = (x.transpose(1, 2) for x in new)  # strided, as a model's projections are
    lengths = torch.full((batch,), length, dtype=torch.int32)
    context = read_context(rows.pages, rows.table, length, rows.rules) if length else None
    append(rows.pages, k_new, v_new, rows.table, lengths, rows.rules)
    rows.keys, rows.values = torch.cat([rows.keys, k_new], 2), torch.cat([rows.values, v_new], 2)
    rows.twin = partial(plain_prefill, query, k_new, v_new, context, rows.rules, **kwargs)
    rows.oracle = partial(oracle, query, rows.keys, rows.values, rows.heads, rows.reach, **kwargs)
    on_device = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in kwargs.items()}
    new = (x.to(DEVICE) for x in (query, k_new, v_new))
    out = triton_prefill.prefill(*new, context and _moved(context), rows.rules, **on_device)
    assert out.is_contiguous()
    return out.cpu()


def _moved(context):
    pages = Pages(*(x.to(DEVICE) for x in context.pages))
    return replace(
        context,
        pages=pages,
        table=context.table.to(DEVICE),
        bands=tuple(tuple(x.to(DEVICE) for x in band) for band in context.bands),
    )


def check(rows, steps, group, scale=0.3, **kwargs):
    for tokens in steps:
        out = step(rows, tokens, group, scale=scale, **kwargs)
        torch.testing.assert_close(out.double(), rows.oracle(), atol=3e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles", "parts")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("heads", HEADS)
def test_every_step_equals_the_masked_oracle(heads, steps):
    rows = Rows(2, HEADS[heads], (24, 24), 8, sum(STEPS[steps]))
    for part in rows.pages:
        part.fill_(torch.nan)  # slots without a token must not be read
    check(rows, STEPS[steps], group=3)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("heads", HEADS)
def test_every_step_equals_the_plain_twin(heads):
    rows = Rows(1, HEADS[heads], (16, 16), 16, 110)
    for tokens in (37, 20, 53):
        out = step(rows, tokens, group=2, scale=0.3)
        torch.testing.assert_close(out, rows.twin(), atol=3e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("first", [1, 2, 19, 20, 21, 70])
def test_windows_of_one_and_beyond_everything_and_sinks_not_yet_full(first):
    rows = Rows(1, [(1000, 3), (1, 0), (1, 20), (7, 20), (70, 1), GLOBAL], (16, 16), 16, 120)
    check(rows, (first, 1, 45), group=1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reach", [12, 40])
@pytest.mark.parametrize("steps", ["prompt", "chunks"])
def test_the_models_own_window_bounds_the_sinks(steps, reach):
    rows = Rows(1, [(7, 2), (reach, 0), (5, 9)], (16, 16), 8, sum(STEPS[steps]), reach=reach)
    check(rows, STEPS[steps], group=2)


@pytest.mark.usefixtures("small_tiles", "parts")
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dims", [(24, 40), (40, 24)], ids=str)
def test_softcap_sink_logits_and_unequal_dims(extras, dims):
    rows = Rows(1, HEADS["mixed"], dims, 8, 60)
    check(rows, (5, 40), group=2, **EXTRAS[extras])


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("group", "dims"), [(1, (32, 32)), (5, (80, 96)), (16, (128, 64)), (2, (256, 256))], ids=str)
def test_page_sizes_groups_and_dims(page_size, group, dims):
    rows = Rows(1, HEADS["mixed"], dims, page_size, 110)
    check(rows, (70, 37), group, scale=dims[0] ** -0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_in_half_precision_is_that_of_plain_attention(dtype):
    rows = Rows(1, HEADS["mixed"], (32, 32), 16, 300, dtype=dtype)
    for tokens in (150, 60, 1):
        out, expected = step(rows, tokens, group=2, scale=0.3), rows.oracle()
        assert out.dtype == dtype
        plain = (rows.oracle(dtype=dtype).double() - expected).abs().max()
        assert (out.double() - expected).abs().max() <= 2 * plain
