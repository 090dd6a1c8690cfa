"""Steps of one token on rows that are plain tensors, against dense attention in float64 under the explicit mask."""

from itertools import pairwise

import pytest
import torch
from paged_rows import GLOBAL, HEADS, Rows
from redknot_kernels import Piece, RowView, step_in_views, view_rows


def lay_out(rows, cuts=()):
    """Moves the pages of rows into runs, kind by kind, and returns the views, cut into pieces at these columns."""
    rules, views, first = rows.rules, [], 0
    size, batch = rules.page_size, len(rows.table)
    pools = [torch.cat([x, torch.full_like(x[:3], torch.nan)]) for x in rows.pages]
    for heads in filter(None, [rules.global_heads, *(heads for _, heads in rules.local_groups)]):
        columns = min(rows.table.shape[2], rules.max_pages[heads[0]])
        pages = rows.table[:, list(heads), :columns].reshape(-1).long()
        for pool, old in zip(pools, rows.pages):
            pool[first : first + len(pages)] = old[pages]
        apart = (batch, len(heads) * columns), (len(heads), columns)
        pieces = [
            Piece(start * size, *(view_rows(pool, first + start, apart, stop - start) for pool in pools))
            for start, stop in pairwise([0, *(cut for cut in cuts if cut < columns), columns])
        ]
        views.append(RowView(heads, tuple(pieces)))
        first += len(pages)
    return views


def decode(rows, views, tokens, group, **kwargs):
    """Decodes tokens one by one, and yields what comes out and what the oracle says."""
    kernels = rows.kernels
    for _ in range(tokens):
        length = rows.keys.shape[2]

        def step(query, pages, k_new, v_new, table, counts, real, rules, length=length, **options):
            counts += 1
            return step_in_views(query, k_new, v_new, views, length, rules, **options)

        rows.kernels = type(kernels)(**{**vars(kernels), "step": step})
        yield rows.step(1, group=group, **kwargs)


@pytest.mark.parametrize("heads", [*HEADS.values(), [GLOBAL, (7, 2), GLOBAL, (7, 2)]], ids=str)
@pytest.mark.parametrize("prompt", [1, 6, 15, 40])
@pytest.mark.parametrize("cuts", [(), (2,), (1, 3)], ids=str)
def test_every_token_equals_the_masked_oracle(heads, prompt, cuts):
    rows = Rows(2, heads, (24, 24), 8, 64)
    rows.step(prompt, group=3, scale=0.3)
    for out, expected in decode(rows, lay_out(rows, cuts), 24, group=3, scale=0.3):
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dims", [(24, 24), (24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{"softcap": 2.0}, {"s_aux": torch.linspace(-1, 2, 8)}, {"softcap": 3.0, "s_aux": torch.linspace(-1, 2, 8)}],
    ids=["softcap", "s_aux", "both"],
)
def test_softcap_sink_logits_and_unequal_dims(kwargs, dims):
    rows = Rows(2, HEADS["mixed"], dims, 8, 64)
    rows.step(30, group=2, scale=0.3, **kwargs)
    for out, expected in decode(rows, lay_out(rows, (2,)), 12, group=2, scale=0.3, **kwargs):
        torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)


def test_the_models_own_window_bounds_the_sinks():
    rows = Rows(1, [(7, 2), (12, 0), (7, 2)], (16, 16), 8, 64, reach=12)
    rows.step(5, group=2, scale=0.3)
    for out, expected in decode(rows, lay_out(rows), 40, group=2, scale=0.3):
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
