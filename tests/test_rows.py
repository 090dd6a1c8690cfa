"""Page bookkeeping, over integers alone."""

import numpy as np
import pytest
from layers import grow, make_rows

from redknot_hf.cache.kinds import kinds, most_pages, places_of
from redknot_hf.cache.table import ABSENT


@pytest.mark.parametrize(
    ("length", "pages"),
    [(0, (0, 0, 0)), (1, (1, 1, 1)), (8, (1, 1, 1)), (9, (2, 2, 2)), (32, (4, 4, 2)), (100, (13, 4, 2))],
)
def test_rows_own_the_pages_they_need(length, pages):
    rows, shelf = make_rows(1)
    grow(rows, shelf, [length])
    assert tuple((rows.table[0] != ABSENT).sum(1)) == pages
    held = rows.table[rows.table != ABSENT]
    assert len(set(held)) == len(held) == shelf.taken


def test_reserving_again_takes_nothing():
    rows, shelf = make_rows()
    grow(rows, shelf, [30, 17])
    version = rows.version
    rows.reserve(np.array([31, 24]), shelf)
    assert rows.version == version


def test_cut_drops_pages_that_hold_nothing():
    rows, shelf = make_rows()
    grow(rows, shelf, [30, 17])
    rows.cut(np.array([9, 0]))
    assert (rows.table[0] != ABSENT).sum(1).tolist() == [2, 2, 2]
    assert (rows.table[1] == ABSENT).all()
    grow(rows, shelf, [30, 17])
    assert (rows.table[:, 0] != ABSENT).sum(1).tolist() == [4, 3]


def test_a_ring_that_went_round_says_what_it_lost():
    rows, shelf = make_rows(1)
    grow(rows, shelf, [100])
    assert rows.oldest().tolist() == [[0, 100 - 29, 100 - 16]]
    assert rows.missing_after(np.array([91])) == 0
    assert rows.missing_after(np.array([89])) > 0
    grow(rows, shelf, [101])
    rows.cut(np.array([95]))
    assert rows.missing_after(np.array([91])) == 0, "taking back does not bring lost tokens back, nor lose more"
    assert rows.missing_after(np.array([90])) > 0


def test_unshare_copies_what_is_shared_and_written():
    rows, shelf = make_rows(1)
    grow(rows, shelf, [20])
    rows.select(np.array([0, 0, 0]))
    refs = np.bincount(rows.table[rows.table != ABSENT])
    source, target = rows.unshare(rows.lengths + 1, refs, shelf)
    # The last page of the global rows and every page of the local ones; one of three holders keeps the original.
    assert len(source) == 2 * (1 + 3 + 2)
    assert set(source) & set(target) == set()
    counts = np.bincount(rows.table[rows.table != ABSENT])
    assert (counts[rows.table[:, 0, :2]] == 3).all()
    assert (counts[rows.table[:, 0, 2]] == 1).all()
    assert (counts[rows.table[:, 1:][rows.table[:, 1:] != ABSENT]] == 1).all()


def test_sequences_that_do_not_grow_stay_shared():
    rows, shelf = make_rows(1)
    grow(rows, shelf, [20])
    rows.select(np.array([0, 0]))
    source, _ = rows.unshare(np.array([20, 21]), np.bincount(rows.table[rows.table != ABSENT]), shelf)
    assert len(source) == 6
    assert len(set(rows.table[0].ravel()) & set(rows.table[1].ravel()) - {ABSENT}) == 2


def test_positions_held_are_the_sink_and_what_the_ring_kept():
    rows, shelf = make_rows(1)
    grow(rows, shelf, [100])
    assert rows.positions_held(0, 1).tolist() == [0, 1, 2, *range(71, 100)]
    assert rows.positions_held(0, 0).tolist() == list(range(100))


def test_a_fork_and_its_origin_grow_apart():
    rows, shelf = make_rows(1)
    grow(rows, shelf, [10])
    other = rows.fork()
    grow(other, shelf, [40])
    assert rows.lengths.tolist() == [10]
    assert (rows.table[0, 0] != ABSENT).sum() == 2


def test_random_histories_never_share_a_written_page():
    generator = np.random.default_rng(0)
    rows, shelf = make_rows(3)
    for _ in range(300):
        action = generator.integers(4)
        if action == 0:
            rows.select(generator.integers(rows.batch, size=generator.integers(1, 5)))
        elif action == 1 and rows.missing_after(lengths := np.maximum(rows.lengths - generator.integers(8), 0)) == 0:
            rows.cut(lengths)
        else:
            lengths = rows.lengths + generator.integers(0, 12, size=rows.batch)
            refs = np.bincount(rows.table[rows.table != ABSENT], minlength=shelf.taken)
            rows.unshare(lengths, refs, shelf)
            rows.reserve(lengths, shelf)
            for b, h in np.argwhere(np.ones(rows.table.shape[:2])):
                for position in range(rows.lengths[b], lengths[b]):
                    sink, ring = rows.rules.sink[h], rows.rules.ring[h]
                    slot = position if position < sink else sink + (position - sink) % ring
                    page = rows.table[b, h, slot // 8]
                    assert page != ABSENT
                    assert (rows.table == page).sum() == 1
            rows.advance(lengths - rows.lengths)


def test_heads_of_equal_rules_get_their_pages_in_a_run():
    rules = make_rows()[0].rules
    found = kinds(rules)
    assert sorted(h for heads in found for h in heads) == [*range(rules.heads)]
    assert [*found[0]] == [*rules.global_heads]
    assert most_pages(rules).tolist() == [*rules.max_pages]
    places = places_of(np.ones((2, rules.heads, 3), bool), rules) // 3 % rules.heads
    in_turn = [next(i for i, heads in enumerate(found) if h in heads) for h in places]
    assert in_turn == sorted(in_turn)
    assert len(places) == 6 * rules.heads
