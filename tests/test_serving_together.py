"""What serving does so that the host and the device wait for little: ends of prompts together, pages in blocks."""

from itertools import pairwise

import pytest
import torch
from families import make_model
from served import SIZES, all_free, alone, prompts_of

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.serving import host
from redknot_hf.serving.engine import Engine
from redknot_hf.serving.request import Sampling


@pytest.fixture(scope="module")
def model():
    return make_model("gemma4")  # layers of other widths, and some that share keys


def test_pages_on_the_host_lie_in_blocks(monkeypatch):
    monkeypatch.setattr(host, "_BLOCK", 1000)
    blocks = host._Filled(host.HostBlocks(pinned=False), 10_000)
    tensors = [torch.randn(7, 4, 8), torch.ones(40, 3, dtype=torch.uint8), torch.randn(2, 400), torch.ones(0, 5)]
    found = [blocks.copied(x) for x in tensors]
    assert [len(x) for x in found] == [1, 2, 2, 0]
    assert all(torch.equal(torch.cat(pieces), x) for pieces, x in zip(found[:3], tensors, strict=False))
    places = [(x.data_ptr(), x.data_ptr() + x.nbytes) for pieces in found for x in pieces]
    assert all(end <= start for (_, end), (start, _) in pairwise(sorted(places)))


def test_pinned_blocks_come_again(monkeypatch):
    monkeypatch.setattr(host, "_BLOCK", 1000)
    free, (block, longer) = host.HostBlocks(pinned=False), (torch.empty(n, dtype=torch.uint8) for n in (1000, 2000))
    free.give([block])
    assert free.take(300).shape == (300,)
    free.pinned = True  # as where there is a device
    free.give([longer, block])
    assert free.take(300) is block
    free.give([block])
    free.clear()
    assert not free._free


def test_ends_of_prompts_are_read_together(model):
    plan = HeadPlan.with_global(model.config, [(1, 1), (1, 0)], HeadSpec(20, 2)).stored("int8", heads=[(1, 1)])
    text = prompts_of(9, 2, longest=90)[0][-1] * 3
    asked = [text[:3], text[5:21], text[3:23], text[9:18]]
    for captures in (False, True):  # on a device without graphs replays are steps
        with torch.inference_mode():  # what was made there can be written outside of it
            engine = Engine(model, plan, **SIZES | {"max_batch": 4, "chunk": 64})
        seats, rows = engine.reader.seats, []
        seats.captures, run = captures, seats._forward_of
        seats._forward_of = lambda asked, run=run, rows=rows: (run(asked), rows.append(tuple(asked.shape)))[0]
        answers = engine.generate(asked, [Sampling(max_new_tokens=n) for n in (9, 3, 6, 7)])
        assert [x.error for x in answers] == [None] * 4
        expected = [alone(model, plan, x, n) for x, n in zip(asked, (9, 3, 6, 7), strict=True)]
        assert [x.ids for x in answers] == expected
        assert rows[0] == ((8, 17) if captures else (3, 17))
        assert all_free(engine)
