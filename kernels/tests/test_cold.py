"""Stored heads: pages that grow cold, and attention over hot and cold ones, against float64 over what they hold."""

import pytest
import torch
from paged_rows import DEVICE
from redknot_kernels import NAMES, UNBOUNDED, HeadRules, Pages, Rotation, implementation, rotate
from stored_rows import INT4, INT8, PLANS, StoredRows

pytest.importorskip("triton")

STEPS = (70, 1, 16, 40)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_attention_over_what_the_rows_hold(name, plan):
    rows = StoredRows(name, PLANS[plan], (32, 32), 16, sum(STEPS))
    for tokens in STEPS:
        out, wanted = rows.step(tokens, group=2, scale=0.1)
        torch.testing.assert_close(out.double(), wanted(), atol=2e-5, rtol=1e-4)
        length = rows.keys.shape[2]
        expected = [rows.rules.cold_pages(length) if bits else 0 for _, _, bits in rows.heads]
        assert rows.cold.counts.tolist() == [expected] * rows.batch


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"s_aux": torch.linspace(-1, 2, 15)}], ids=["softcap", "s_aux"])
@pytest.mark.parametrize(("dims", "page_size", "group"), [((96, 80), 16, 3), ((20, 40), 32, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_odd_dims_softcap_and_sink_logits(name, dims, page_size, group, options):
    rows = StoredRows(name, PLANS["mixed"], dims, page_size, 140, batch=1)
    for tokens in (120, 5):
        out, wanted = rows.step(tokens, group=group, scale=0.1, **options)
        torch.testing.assert_close(out.double(), wanted(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("dim", "group"), [(32, 1), (64, 16), (128, 4), (256, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_dims_and_groups(name, dim, group):
    rows = StoredRows(name, [INT8, INT4], (dim, dim), 64, 210, batch=1)
    rows.step(200, group=group, scale=dim**-0.5)
    out, wanted = rows.step(1, group=group, scale=dim**-0.5)
    torch.testing.assert_close(out.double(), wanted(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("storage", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_error_in_half_precision_is_at_most_twice_that_of_plain_attention(name, storage, dtype):
    rows = StoredRows(name, [storage] * 2, (64, 64), 16, 420, dtype=dtype)
    for tokens in (150, 9):
        out, wanted = rows.step(tokens, group=2, scale=0.1)
        plain = (wanted(dtype=dtype).double() - wanted()).abs().max()
        assert (out.double() - wanted()).abs().max() <= 2 * plain


@pytest.mark.parametrize("dims", [(32, 32), (96, 80)], ids=str)
def test_both_make_the_same_pages(dims):
    rows = [StoredRows(name, PLANS["mixed"], dims, 16, 100, batch=1) for name in ("torch", "triton")]
    for tokens in (60, 1, 16, 16):
        for one in rows:
            one.step(tokens, group=1, scale=0.1)
    most = 0.01 if DEVICE == "cuda" else 0.003  # a sum in another order may choose the neighbouring code
    for a, b in zip(rows[0].cold[:2], rows[1].cold[:2], strict=True):
        held = b.scales.cpu().isfinite().all(1)
        assert 0 < held.sum() < len(held)
        differ = (a.codes[held].int() - b.codes.cpu()[held].int()).abs()
        assert (differ > 0).float().mean() < most
        torch.testing.assert_close(b.scales.cpu()[held], a.scales[held], atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_rows_of_any_length(name):
    rows = StoredRows(name, [INT8, INT4], (32, 32), 16, 200, batch=3)
    rows.step(60, group=1, scale=0.1)
    lengths = [60, 60, 60]
    for seed in range(5):  # sequence by sequence the lengths part
        real = torch.rand(3, 9, generator=torch.Generator().manual_seed(seed)) < torch.tensor([[1.0], [0.5], [0.0]])
        query, k_new, v_new = (torch.randn(3, 2, 9, 32, generator=rows.generator) for _ in range(3))
        moved = [x.to(rows.device) for x in (query, k_new, v_new, real)]
        rows.kernels.step(
            moved[0], rows.pages, moved[1], moved[2], rows.table, rows.counts, moved[3], rows.rules, scale=0.1,
            cold=rows.cold,
        )  # fmt: skip
        lengths = [n + int(r.sum()) for n, r in zip(lengths, real, strict=True)]
    assert rows.counts.tolist()[:3] == lengths
    assert rows.cold.counts.tolist() == [[rows.rules.cold_pages(n)] * 2 for n in lengths]
    assert len(set(lengths)) == 3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_grows_cold_with_the_token_that_fills_the_tail(name, batch):
    rows = StoredRows(name, [INT8, (9, 2, 0), INT4], (32, 32), 16, 100, batch=batch, hot=20)
    for tokens, cold in ((66, 1), (1, 1), (1, 2), (1, 2)):
        out, wanted = rows.step(tokens, group=2, scale=0.1)
        torch.testing.assert_close(out.double(), wanted(), atol=2e-5, rtol=1e-4)
        assert rows.cold.counts.tolist() == [[cold, 0, cold]] * batch


@pytest.mark.parametrize("name", NAMES)
def test_what_is_cold_stays_so_after_a_cut_within_the_hot_tail(name):
    rows = StoredRows(name, [INT8, INT4], (32, 32), 16, 200, batch=1)
    rows.step(100, group=1, scale=0.1)
    before = rows.cold.counts.clone()
    cut = 100 - rows.rules.hot
    rows.keys, rows.values, rows.counts[:] = rows.keys[:, :, :cut], rows.values[:, :, :cut], cut
    for tokens in (1, 5):
        out, wanted = rows.step(tokens, group=1, scale=0.1)
        torch.testing.assert_close(out.double(), wanted(), atol=2e-5, rtol=1e-4)
        assert torch.equal(rows.cold.counts, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turns", [False, True], ids=["copied", "turned"])
def test_a_span_that_is_placed_grows_cold(name, turns):
    rows = StoredRows(name, [INT8, (9, 2, 0), INT4], (32, 32), 16, 200, batch=1, hot=10)
    rows.step(30, group=1, scale=0.1)
    keys, values = torch.randn(3, 90, 32), torch.randn(3, 90, 32)
    angles = torch.rand(90, 16) * 10
    rotation = Rotation(angles.cos(), angles.sin()) if turns else None
    on_device = None if rotation is None else Rotation(*(x.to(rows.device) for x in rotation[:2]))
    flat = [x.flatten(0, 1).to(rows.device) for x in (keys, values)]
    kept = (UNBOUNDED,) * 3, (0,) * 3
    span = 90, 5, 25  # of the span the rows hold five tokens already
    rows.kernels.place(rows.pages, *flat, rows.table[0], rows.rules, kept, span, on_device, cold=rows.cold)
    if turns:
        keys = rotate(keys, rotation)
    rows.keys, rows.values = (torch.cat([x, y[None, :, 5:]], 2) for x, y in ((rows.keys, keys), (rows.values, values)))
    rows.counts[:] = 115
    assert rows.cold.counts.tolist() == [[rows.rules.cold_pages(115), 0, rows.rules.cold_pages(115)]]
    out, wanted = rows.step(1, group=1, scale=0.1)
    torch.testing.assert_close(out.double(), wanted(), atol=2e-5, rtol=1e-4)


def test_rules_of_stored_heads():
    rules = HeadRules.make((UNBOUNDED, UNBOUNDED, 30), (0, 0, 4), 16, storage=(8, 0, 0), hot=20)
    assert (rules.global_heads, rules.stored_heads, rules.local_heads) == ((1,), (0,), (2,))
    assert rules.stored_groups == ((8, (0,)),)
    assert rules.sink == (16, 0, 4)
    assert rules.max_pages[0] * 16 >= 16 + 20 + 2 * 16  # the first page, the tail, one that fills and one to write
    assert rules.slack >= 16
    assert rules.take((1, 2)).storage == ()
    assert rules.as_seen.sink == (0, 0, 4)
    assert implementation("torch").cool is not None
    assert Pages(torch.zeros(1, 16, 2), torch.zeros(1, 16, 2)).page_size == 16
