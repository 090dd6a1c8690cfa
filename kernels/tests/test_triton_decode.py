"""The Triton kernels of decoding, held against the same oracle as their plain twins."""

from types import SimpleNamespace

import pytest
import torch
from paged_rows import DEVICE, HEADS, PLAIN, STEPS, Rows
from redknot_kernels import UNBOUNDED, HeadRules, Pages
from redknot_kernels import append as plain_append
from redknot_kernels import decode as plain_decode
from redknot_kernels import step as plain_step

pytest.importorskip("triton")

from redknot_kernels.triton import decode as triton_decode
from redknot_kernels.triton.decode import decode, step
from redknot_kernels.triton.quantise import append
from triton import knobs

TRITON = SimpleNamespace(append=append, step=step, prefill=PLAIN.prefill)


@pytest.mark.parametrize("steps", ["prompt", "chunks", "short", "verify"])
@pytest.mark.parametrize("heads", HEADS)
def test_every_step_equals_the_masked_oracle(heads, steps):
    rows = Rows(2, HEADS[heads], (24, 24), 16, sum(STEPS[steps]), kernels=TRITON)
    for part in rows.pages:
        part.fill_(torch.nan)  # slots without a token must not be read
    rows.kernels = SimpleNamespace(append=append, step=step, prefill=lambda *a, **k: None)
    for tokens in STEPS[steps]:
        out, expected = rows.step(tokens, group=2, scale=0.3)
        if out is not None:
            torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("group", "dims"), [(1, (32, 32)), (5, (80, 96)), (16, (128, 64)), (2, (256, 256))], ids=str)
def test_page_sizes_groups_and_dims(page_size, group, dims):
    rows = Rows(1, HEADS["mixed"], dims, page_size, 140, kernels=TRITON)
    rows.fill(130)
    for tokens in (1, 5):
        out, expected = rows.step(tokens, group=group, scale=0.1)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)


class Unlaunched:
    """In place of a kernel: notes what its launches would be compiled for."""

    def __init__(self):
        self.seen = set()

    def __getitem__(self, grid):
        return lambda *args, **constants: self.seen.add(tuple(sorted(constants.items())))


def test_steps_of_all_lengths_share_few_kernels(monkeypatch):
    kernels = {name: Unlaunched() for name in ("split_kernel", "merge_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_decode, name, kernel)
    rows = Rows(1, HEADS["mixed"], (16, 16), 64, 4000, kernels=TRITON)
    counts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for tokens in range(1, 65):
        query, new = (torch.zeros(1, heads, tokens, 16, device=DEVICE) for heads in (16, 4))
        step(query, rows.pages, new, new, rows.table, counts, None, rows.rules, scale=0.3)
    assert 1 < len(kernels["split_kernel"].seen) <= 6
    assert 1 < len(kernels["merge_kernel"].seen) <= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles")
def test_nothing_is_compiled_for_another_length(monkeypatch):
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **made: compiled.append(made["repr"]))
    for room, steps in ((4000, (1, 2, 8, 12, 22, 40)), (4096, (1, 3, 4, 5, 7, 9, 16, 33, 208))):  # pages, and tokens
        rows, before = Rows(1, HEADS["mixed"], (16, 16), 16, room, kernels=TRITON), len(compiled)
        for tokens in steps:
            rows.step(tokens, group=4, scale=0.3)
    assert before > 0
    assert compiled[before:] == []


@pytest.mark.parametrize("reach", [12, 40])
def test_the_models_own_window_bounds_the_sinks(reach):
    rows = Rows(1, [(7, 2), (reach, 0), (5, 0)], (16, 16), 16, 60, reach=reach, kernels=TRITON)
    for tokens in (20, 1, 13, 1, 20, 5):
        out, expected = rows.step(tokens, group=2, scale=0.3)
        torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("s_aux", [None, torch.linspace(-1, 2, 8)], ids=["plain", "s_aux"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_softcap_and_sink_logits(softcap, s_aux):
    rows = Rows(2, HEADS["mixed"], (24, 40), 16, 80, kernels=TRITON)
    for tokens in (70, 1, 5):
        out, expected = rows.step(tokens, group=2, scale=0.3, softcap=softcap, s_aux=s_aux)
        torch.testing.assert_close(out.double(), expected, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_half_precision_is_at_most_twice_that_of_plain_attention(dtype):
    rows = Rows(1, HEADS["mixed"], (32, 32), 16, 320, dtype=dtype, kernels=TRITON)
    for tokens in (300, 1, 9):
        out, expected = rows.step(tokens, group=2, scale=0.3)
        plain = (rows.oracle(dtype=dtype).double() - expected).abs().max()
        assert (out.double() - expected).abs().max() <= 2 * plain


@pytest.mark.parametrize("length", [1000, 4097])
def test_splits_are_merged(length):
    rows = Rows(1, HEADS["mixed"], (16, 16), 64, length + 1, kernels=TRITON)
    rows.fill(length)
    out, expected = rows.step(1, group=1, scale=0.3)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)


def test_rows_of_very_different_length_and_none():
    lengths = torch.tensor([0, 1, 700, 33], dtype=torch.int64)
    rules = HeadRules.make((UNBOUNDED, 30), (0, 4), page_size=16)
    generator = torch.Generator().manual_seed(0)
    pages = [min(-(-701 // 16), most) for most in rules.max_pages]
    order = torch.randperm(4 * sum(pages), generator=generator).int()
    table = torch.zeros(4, 2, max(pages), dtype=torch.int32)
    table[:, 0], table[:, 1, : pages[1]] = order[: 4 * pages[0]].view(4, -1), order[4 * pages[0] :].view(4, -1)
    pools = torch.randn(2, len(order), 16, 24, generator=generator)
    k_new, v_new = (torch.randn(4, 2, 1, 24, generator=generator) for _ in range(2))
    query = torch.randn(4, 1, 4, 24, generator=generator).transpose(1, 2)
    query, pools, k_new, v_new, table, lengths = (x.to(DEVICE) for x in (query, pools, k_new, v_new, table, lengths))
    pages, plain = Pages(*pools), Pages(*pools.clone())
    append(pages, k_new, v_new, table, lengths, rules)
    plain_append(plain, k_new, v_new, table, lengths, rules)
    assert torch.equal(pages.keys, plain.keys)
    assert torch.equal(pages.values, plain.values)
    for counted in (lengths + 1, lengths):
        out = decode(query, pages, table, counted, rules, scale=0.2)
        torch.testing.assert_close(
            out, plain_decode(query, plain, table, counted, rules, scale=0.2), atol=2e-6, rtol=1e-5
        )
    assert (decode(query, pages, table, lengths * 0, rules, scale=0.2) == 0).all()


@pytest.mark.parametrize("tokens", [1, 16, 40, 100])
@pytest.mark.parametrize("length", [0, 3, 50])
def test_append_writes_what_the_plain_one_does(length, tokens):
    rules = HeadRules.make((UNBOUNDED, 7, 33), (0, 5, 2), page_size=16)
    table = torch.arange(2 * 3 * 10, dtype=torch.int32, device=DEVICE).view(2, 3, 10)
    lengths = torch.full((2,), length, device=DEVICE)
    k_new = torch.randn(2, tokens, 3, 24, device=DEVICE).transpose(1, 2)
    v_new = torch.randn(2, 3, tokens, 40, device=DEVICE)
    written = []
    for function in (append, plain_append):
        pages = Pages(torch.zeros(60, 16, 24, device=DEVICE), torch.zeros(60, 16, 40, device=DEVICE))
        function(pages, k_new, v_new, table, lengths, rules)
        written.append(pages)
    assert all(torch.equal(ours, plain) for ours, plain in zip(*written, strict=True))


def _steps_of_both(lengths, tokens, real, group=2, dims=(24, 24), page_size=16, room=200, **options):
    """Runs one step with the kernel and with its twin, from the same rows; returns what each gave and left behind."""
    heads = (UNBOUNDED, 0), (30, 4), (5, 0)
    rules = HeadRules.make(*zip(*heads, strict=True), page_size=page_size)
    generator = torch.Generator().manual_seed(0)
    batch, columns = len(lengths), -(-room // page_size)
    held = [min(columns, most) for most in rules.max_pages]
    order = torch.randperm(batch * sum(held), generator=generator).int()
    table = torch.zeros(batch, len(heads), columns, dtype=torch.int32)
    for b, part in enumerate(order.split(sum(held))):
        for h, pages in enumerate(part.split(held)):
            table[b, h, : len(pages)] = pages
    pages = [torch.randn(len(order), page_size, dim, generator=generator) for dim in dims]
    shapes = (group * len(heads), dims[0]), (3, dims[0]), (3, dims[1])
    new = [torch.randn(batch, tokens, *shape, generator=generator).transpose(1, 2) for shape in shapes]
    counts = torch.tensor([*lengths, max(lengths)], dtype=torch.int32)
    found = []
    for function, device in ((step, DEVICE), (plain_step, "cpu")):
        *pools, held_counts = (x.clone().to(device) for x in (*pages, counts))
        query, k_new, v_new = (x.to(device) for x in new)
        flags = None if real is None else real.to(device)
        arguments = Pages(*pools), k_new, v_new, table.to(device), held_counts, flags, rules
        moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        out = function(query, *arguments, **{"scale": 0.3, **moved})
        found.append([x.cpu() for x in (out, *pools, held_counts)])
    return found


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_padding_is_neither_written_nor_seen_nor_counted(tokens):
    real = torch.rand(5, tokens, generator=torch.Generator().manual_seed(tokens)) < 0.6
    real[0], real[1] = True, False
    ours, plain = _steps_of_both([0, 1, 150, 33, 16], tokens, real)
    torch.testing.assert_close(ours[0][real], plain[0][real], atol=3e-6, rtol=1e-5)
    assert ours[0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], plain[1:], strict=True))


@pytest.mark.parametrize("lengths", [[0], [1, 0], [190, 3, 64, 17], [15, 16, 17]], ids=str)
def test_rows_of_any_length_step_together(lengths):
    ours, plain = _steps_of_both(lengths, 1, None)
    torch.testing.assert_close(ours[0], plain[0], atol=3e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], plain[1:], strict=True))


@pytest.mark.parametrize(
    ("dims", "group", "page_size", "tokens"),
    [((192, 128), 3, 32, 1), ((96, 192), 7, 128, 2), ((80, 80), 16, 64, 1), ((32, 256), 1, 16, 11)],
    ids=str,
)
def test_odd_shapes_with_softcap_and_sink_logits_at_any_lengths(dims, group, page_size, tokens):
    options = {"softcap": 3.0, "s_aux": torch.linspace(-2, 2, 3 * group), "scale": 0.1}
    ours, plain = _steps_of_both([0, 1, 189, 64], tokens, None, group, dims, page_size, **options)
    torch.testing.assert_close(ours[0], plain[0], atol=3e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], plain[1:], strict=True))


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
def test_a_step_of_more_tokens_than_a_launch_takes(padded):
    tokens, dims = 36, (80, 80)
    assert tokens > triton_decode.most_new_tokens(80, 4)
    real = torch.rand(3, tokens, generator=torch.Generator().manual_seed(1)) < 0.7 if padded else None
    ours, plain = _steps_of_both([0, 5, 190], tokens, real, 1, dims, 64, room=270)
    seen = torch.ones(3, tokens, dtype=torch.bool) if real is None else real
    torch.testing.assert_close(ours[0][seen], plain[0][seen], atol=3e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], plain[1:], strict=True))


def test_a_step_as_long_as_the_slack_overwrites_nothing_that_is_still_seen():
    ours, plain = _steps_of_both([200, 33], 27, None, group=1, room=240)
    torch.testing.assert_close(ours[0], plain[0], atol=3e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], plain[1:], strict=True))


def test_splits_are_whole_tiles():
    from redknot_kernels.triton import configurations
    from redknot_kernels.triton import decode as triton_decode

    tiles = [e["keys"] for entries in configurations.configurations("decode").values() for e in entries.values()]
    assert all(triton_decode._MIN_SPLIT % keys == 0 for keys in tiles)  # else splits would share slots


def test_a_token_beyond_the_last_page_is_not_written():
    rules = HeadRules.make((UNBOUNDED,), (0,), page_size=16)
    pages = torch.randn(3, 16, 24, device=DEVICE)
    before, table = pages.clone(), torch.tensor([[[2, 0]]], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([32, 32], dtype=torch.int32, device=DEVICE)
    new = torch.randn(1, 1, 1, 24, device=DEVICE)
    out = step(new, Pages(pages, pages), new, new, table, counts, None, rules, scale=0.3)
    assert out.isfinite().all()
    assert torch.equal(pages, before)


def test_the_operator_is_what_the_compiler_takes_it_for():
    rules = HeadRules.make((UNBOUNDED, 7), (0, 2), page_size=16)
    pages = [torch.randn(6, 16, 24, device=DEVICE) for _ in range(2)]
    table = torch.arange(6, dtype=torch.int32, device=DEVICE).view(1, 2, 3)
    counts = torch.tensor([20, 20], dtype=torch.int32, device=DEVICE)
    query, k_new, v_new = (torch.randn(1, n, 1, 24, device=DEVICE) for n in (4, 2, 2))
    rows = table, counts, None, rules.tensors(torch.device(DEVICE)), rules.most_kept(3), rules.reach
    for new in ((k_new, v_new), (None, None)):
        torch.library.opcheck(
            triton_decode.captured_step,
            (query, *pages, *new, *rows, 0.3, None, None, *[None] * 6, [], 0),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_the_operator_has_no_defaults():
    # Up to 2.12 torch counts the writes to arguments that it left out for being at their defaults, and raises.
    arguments = triton_decode.captured_step._opoverload._schema.arguments
    assert not [a.name for a in arguments if a.has_default_value()]


def test_the_operator_without_new_tokens_decodes_what_the_pages_hold():
    rules = HeadRules.make((UNBOUNDED, 7), (0, 2), page_size=16)
    pages = [torch.randn(6, 16, 24, device=DEVICE) for _ in range(2)]
    table = torch.arange(6, dtype=torch.int32, device=DEVICE).view(1, 2, 3)
    counts = torch.tensor([20, 20], dtype=torch.int32, device=DEVICE)
    query = torch.randn(1, 4, 2, 24, device=DEVICE)
    held = [x.clone() for x in (*pages, counts)]
    rows = table, counts, None, rules.tensors(torch.device(DEVICE)), rules.most_kept(3), rules.reach
    found = triton_decode.captured(query, *pages, None, None, *rows, 0.3, None, None)
    torch.testing.assert_close(found, decode(query, Pages(*pages), table, counts[:1], rules, scale=0.3))
    assert all(map(torch.equal, held, (*pages, counts)))


@pytest.mark.parametrize(("group", "steps"), [(3, (1, 24, 33)), (8, (1, 10, 17))], ids=str)
def test_more_queries_than_a_program_takes(group, steps):
    rows = Rows(1, HEADS["mixed"], (16, 16), 64, 200, kernels=TRITON)
    rows.fill(140)
    for tokens in steps[:2]:
        out, expected = rows.step(tokens, group=group, scale=0.3)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)
    out, expected = rows.step(steps[2], group=group, scale=0.3, s_aux=torch.linspace(-1, 2, 4 * group))
    torch.testing.assert_close(out.double(), expected, atol=4e-6, rtol=1e-5)
