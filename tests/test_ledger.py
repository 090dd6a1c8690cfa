"""Bookkeeping of one layer without any attention: cuts, selections, forks, what is reserved, and what is sent."""

import pickle

import numpy as np
import pytest
import torch
from redknot_kernels import UNBOUNDED, HeadRules, implementation

from redknot_hf.cache.ledger import Ledger

# Heads: one keeps everything, one a window of 7 behind 2 first tokens.
RULES = HeadRules.make((UNBOUNDED, 7), (0, 2), page_size=4)


def make(lengths, reserved=None):
    """A ledger of sequences of equally many slots, the shorter ones padded on the left; pages are numbered."""
    ledger = Ledger(
        len(lengths), RULES, (3, 5), torch.float32, torch.device("cpu"), implementation("torch"), reserved
    )  # fmt: skip
    lengths, slots = np.array(lengths), max(lengths)
    with ledger.pool.lock:
        ledger._make_room(lengths)
        ledger.rows.advance(lengths)
        ledger._mirrored()
    ledger.history.add(torch.arange(slots) >= slots - torch.from_numpy(lengths)[:, None])
    for part in ledger.pool.pages:
        part.copy_(torch.arange(len(part), dtype=torch.float32)[:, None, None].expand_as(part))
    return ledger


def listed(ledger):
    table = ledger.rows.table
    return set(table[table >= 0].tolist())


def test_a_cut_takes_slots_back_and_frees_their_pages():
    ledger = make([30, 20])
    before = ledger.nbytes
    ledger.cut(20)
    assert ledger.rows.lengths.tolist() == [10, 0]  # of the second, slots 10 to 29 are all its tokens
    assert ledger.history.slots == 10
    assert ledger.nbytes < before
    assert len(ledger.pool.pages.keys) - ledger.pool.free == len(listed(ledger))


def test_what_a_cut_would_miss_is_what_the_ring_has_overwritten():
    ledger = make([30])
    held = RULES.ring[1] + RULES.sink[1]
    assert ledger.missing_after_cut(0) == 0
    for slots in range(31):
        length = 30 - slots
        seen = {k for k in range(length) if k > length - 7 or k < 2}  # by the next query, at `length`
        kept = {*range(2), *range(30 - held + 2, 30)}
        assert ledger.missing_after_cut(slots) == len(seen - kept), slots


def test_selected_sequences_list_the_pages_of_those_they_were():
    ledger = make([12, 9])
    first, second = (ledger.rows.table[i].tolist() for i in range(2))
    ledger.select(torch.tensor([1, 1, 0]))
    assert ledger.rows.table.tolist() == [second, second, first]
    assert ledger.rows.lengths.tolist() == [9, 9, 12]
    before = ledger.nbytes
    ledger.select(torch.tensor([0]), shrink=True)
    assert ledger.rows.lengths.tolist() == [9]
    assert ledger.nbytes < before


@pytest.mark.parametrize("reserved", [None, 40])
def test_a_fork_shares_pages_unless_they_are_reserved(reserved):
    ledger = make([12], reserved)
    fork = ledger.fork()
    assert (fork.pool is ledger.pool) == (reserved is None)
    assert fork.rows.lengths.tolist() == [12]
    fork.cut(12)
    assert ledger.rows.lengths.tolist() == [12]
    assert ledger.history.slots == 12


def test_clear_keeps_what_is_reserved_and_zeroes_it():
    ledger = make([12], 40)
    pages, before = ledger.pool.pages, ledger.nbytes
    assert pages.keys.any()
    ledger.clear()
    assert ledger.pool.pages.keys.data_ptr() == pages.keys.data_ptr()
    assert ledger.nbytes == before
    assert not pages.keys.any()
    assert not pages.values.any()
    assert (ledger.rows.lengths.tolist(), ledger.history.slots) == ([0], 0)


def test_only_its_own_pages_are_sent():
    ledger = make([30, 30])
    alone = ledger.fork()
    alone.select(torch.tensor([1]))
    sent = pickle.loads(pickle.dumps(alone))
    assert sent.rows.lengths.tolist() == [30]
    assert len(sent.pool.pages.keys) == len(listed(sent)) < len(ledger.pool.pages.keys)
    for head in range(2):
        mine, theirs = (x.rows.table[0, head] for x in (sent, alone))
        assert torch.equal(sent.pool.pages.keys[mine[mine >= 0]], alone.pool.pages.keys[theirs[theirs >= 0]])


def test_left_align_lets_slots_be_the_real_tokens():
    ledger = make([6, 9])
    ledger.history.add(3)  # as if three slots of padding for all had come behind
    ledger.left_align()
    assert ledger.history.slots == 9
    assert ledger.history.real_among_last(9, 2).tolist() == [6, 9]


def test_plain_kernels_capture_nothing_and_have_nothing_to_catch_up_with():
    ledger = make([6], 40)
    assert not ledger.compileable
    assert not ledger.captures(1)
    ledger.catch_up()
    assert ledger.rows.lengths.tolist() == [6]
