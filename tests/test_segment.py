from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from redknot_kernels import UNBOUNDED

from redknot_hf.cache.span import KeptLayer, places
from redknot_hf.reuse.coarse import Coarse
from redknot_hf.reuse.copies import Copies, Held
from redknot_hf.reuse.segment import Segment, empty

LAYER = KeptLayer((UNBOUNDED, 4, 4, 1), (0, 2, 0, 0), 3, 5)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (8, [range(8), [0, 1, 4, 5, 6, 7], range(4, 8), [7]]),
        (6, [range(6), range(6), range(2, 6), [5]]),  # sink and window meet
        (5, [range(5), range(5), range(1, 5), [4]]),  # and overlap
        (1, [[0], [0], [0], [0]]),
    ],
)
def test_heads_keep_sinks_and_windows(tokens, expected):
    heads, kept = LAYER.packed(tokens)
    for head, wanted in enumerate(expected):
        np.testing.assert_array_equal(kept[heads == head], list(wanted))
        tail = LAYER.tails(tokens)[head]
        assert set(range(tail, tokens)) <= set(wanted)
        assert tail == 0 or tail - 1 not in wanted
    assert LAYER.kept(tokens) == sum(map(len, expected))


def test_views_tile_the_data():
    layers = (LAYER, None, KeptLayer((2,), (1,), 4, 4))
    segment = empty("address", tuple(range(7)), (), layers, torch.zeros(0, dtype=torch.bfloat16))
    for i in (0, 2):
        segment.keys(i).fill_(2 * i + 1)
        segment.values(i).fill_(2 * i + 2)
    counts = {value: int((segment.data == value).sum()) for value in (0, 1, 2, 5, 6)}
    n = LAYER.kept(7)
    assert counts == {0: 0, 1: 3 * n, 2: 5 * n, 5: 12, 6: 12}
    assert segment.nbytes == 2 * (8 * n + 24) == segment.data.nbytes
    assert segment.dense_nbytes == 2 * 7 * (4 * 8 + 8)
    assert "7 tokens" in repr(segment)
    with pytest.raises(ValueError, match="no keys of its own"):
        segment.keys(1)


@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_parts_of_layers_are_the_data(parts, storage):
    layers = (KeptLayer((UNBOUNDED, 4), (0, 2), 4, 6), None, *[KeptLayer((2,), (1,), 4, 4)] * 3)
    coarse = None if storage == "model" else Coarse(storage, torch.bfloat16)
    segment = empty("address", tuple(range(40)), (), layers, torch.zeros(0, dtype=torch.bfloat16), coarse)
    for part in range(parts):
        for where in segment.extents(part, parts):
            segment.data[where] += 1
    assert (segment.data == 1).all()
    held = Held(segment, tuple(range(parts)))
    for i in (0, 2, 3, 4):  # all of a layer is in the part that one waits for
        filled = segment.with_data(torch.zeros_like(segment.data))
        for part in range(held.part(i) + 1):
            for where in segment.extents(part, parts):
                filled.data[where] = segment.data[where]
        assert all(torch.equal(*pair) for pair in zip(filled.pair(i), segment.pair(i), strict=True))
    assert held.part(0) == 0
    assert held.part(-1) == -1


def test_copies_are_begun_when_they_are_near(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    stream = SimpleNamespace(record_event=object)
    layers = [KeptLayer((UNBOUNDED,), (0,), 2, 2)] * 6
    held = [Held(empty(name, (1, 2, 3), (), tuple(layers), torch.zeros(0))) for name in "ab"]
    targets = [torch.zeros_like(one.segment.data) for one in held]
    for one in held:
        one.segment.data.fill_(1)
    copies = Copies(stream, held, targets, 6)
    mine, other = (Held(held[i].segment.with_data(targets[i]), copies.events(i)) for i in range(2))
    assert not any(target.any() for target in targets)
    first = mine.ready[mine.part(0)]
    assert [sum(bool(mine.segment.keys(i).any()) for i in range(6)), int(other.segment.data.sum())] == [3, 3 * 12]
    assert mine.ready[0] is first is not other.ready[0]
    assert other.ready[other.part(4)] not in (first, mine.ready[4])
    assert all(target.all() for target in targets)
    assert len(mine.ready) == 6
    assert mine.ready[-1] is mine.ready[5]


def test_a_segment_moves_with_its_data():
    segment = Segment("a", (1, 2), (), (LAYER,), torch.arange(float(places((LAYER,), 2)[1])))
    moved = segment.with_data(segment.data + 1)
    torch.testing.assert_close(moved.keys(0), segment.keys(0) + 1)
    assert moved.ids == segment.ids


def test_bytes_follow_the_plan():
    """1/8 of the heads global, windows of 256: at most 0.16 of a dense cache at 8K."""
    layer = KeptLayer((UNBOUNDED, *[256] * 7), (0, *[4] * 7), 128, 128)
    _, elements = places((layer,) * 32, 8192)
    assert elements / (32 * 8 * 8192 * 256) <= 0.16
