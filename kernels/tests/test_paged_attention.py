"""Paged attention against an oracle: dense attention in float64 under the explicit mask."""

import pytest
import redknot_kernels.plain.prefill as prefill_module
import torch
from paged_rows import GLOBAL, HEADS, STEPS, Rows, oracle
from redknot_kernels import UNBOUNDED, HeadRules, Pages, append, decode


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [8, 16])
def test_every_step_equals_the_masked_oracle(heads, steps, page_size):
    rows = Rows(2, HEADS[heads], (24, 24), page_size, sum(STEPS[steps]))
    for tokens in STEPS[steps]:
        out, expected = rows.step(tokens, group=3, scale=0.3)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("reach", [12, 40])
@pytest.mark.parametrize("steps", ["chunks", "prompt"])
def test_the_models_own_window_bounds_the_sinks(steps, reach):
    rows = Rows(1, [(7, 2), (reach, 0), (5, 0)], (16, 16), 8, sum(STEPS[steps]), reach=reach)
    for tokens in STEPS[steps]:
        out, expected = rows.step(tokens, group=2, scale=0.3)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


def test_a_later_chunk_costs_what_the_rows_hold_and_not_what_a_window_allows(monkeypatch):
    widest = []
    inner = prefill_module.attend

    def attend(query, key, *args, **kwargs):
        widest.append(key.shape[2])
        return inner(query, key, *args, **kwargs)

    monkeypatch.setattr(prefill_module, "attend", attend)
    rows = Rows(2, [GLOBAL, (10**8, 2), (10**5, 0), (41, 90), (7, 10**6)], (16, 16), 8, 123)
    for tokens in (40, 33, 50):
        out, expected = rows.step(tokens, group=2, scale=0.3)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    assert max(widest) <= 3 * 123


@pytest.mark.parametrize(
    "kwargs",
    [{"softcap": 2.0}, {"s_aux": torch.linspace(-1, 2, 8)}, {"softcap": 3.0, "s_aux": torch.linspace(-1, 2, 8)}],
    ids=["softcap", "s_aux", "both"],
)
@pytest.mark.parametrize("dims", [(24, 24), (24, 40), (40, 24)], ids=str)
def test_softcap_sink_logits_and_unequal_dims(kwargs, dims):
    rows = Rows(2, HEADS["mixed"], dims, 8, sum(STEPS["chunks"]))
    for tokens in STEPS["chunks"]:
        out, expected = rows.step(tokens, group=2, scale=0.3, **kwargs)
        torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_in_half_precision_is_that_of_plain_attention(dtype):
    rows = Rows(1, HEADS["mixed"], (32, 32), 16, 400, dtype=dtype)
    for tokens in (300, 1, 1, 60, 1):
        out, expected = rows.step(tokens, group=2, scale=0.3)
        plain = (rows.oracle(dtype=dtype).double() - expected).abs().max()
        assert (out.double() - expected).abs().max() <= 2 * plain


def test_rows_of_different_length_decode_together():
    heads, lengths = HEADS["mixed"], [0, 1, 6, 37, 90]
    rows = [Rows(1, heads, (16, 16), 8, 91, seed=i) for i in range(len(lengths))]
    singles = []
    for row, length in zip(rows, lengths):
        if length:
            row.step(length, group=2, scale=0.3)
    pages = torch.cumsum(torch.tensor([0] + [len(r.pages.keys) for r in rows]), 0)
    table = torch.cat([r.table + int(p) for r, p in zip(rows, pages)])
    pool = Pages(*map(torch.cat, zip(*(r.pages for r in rows), strict=True)))
    generator = torch.Generator().manual_seed(7)
    query, k_new, v_new = (torch.randn(5, h, 1, 16, generator=generator) for h in (8, 4, 4))
    for i, row in enumerate(rows):
        keys, values = torch.cat([row.keys, k_new[i : i + 1]], 2), torch.cat([row.values, v_new[i : i + 1]], 2)
        singles.append(oracle(query[i : i + 1], keys, values, heads, UNBOUNDED, 0.3))
    before = torch.tensor(lengths, dtype=torch.int32)
    append(pool, k_new, v_new, table, before, rows[0].rules)
    out = decode(query, pool, table, before + 1, rows[0].rules, scale=0.3)
    torch.testing.assert_close(out.double(), torch.cat(singles), atol=2e-6, rtol=1e-5)
    empty = decode(query, pool, table, torch.zeros_like(before), rows[0].rules, scale=0.3)
    assert (empty == 0).all()


def test_slots_and_positions_are_inverse():
    rules = HeadRules.make((UNBOUNDED, 7, 1, 33), (0, 2, 0, 5), page_size=8)
    for length in range(1, 120):
        slots = torch.arange(128)
        held = rules.positions(slots, torch.tensor([length]))[0]
        for h in range(rules.heads):
            kept = [p for p in range(length) if p < rules.sink[h] or p >= length - rules.ring[h]]
            found = {int(p): int(s) for s, p in enumerate(held[h]) if p < length and s < rules.max_pages[h] * 8}
            assert set(found) >= set(kept[-rules.window[h] :])
            where = rules.slots(torch.tensor(kept)[None])[h]
            assert [found[p] for p in kept] == where.tolist()
