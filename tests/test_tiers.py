from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch

from redknot_hf.cache.span import KeptLayer
from redknot_hf.reuse.counts import Counts
from redknot_hf.reuse.segment import Segment
from redknot_hf.reuse.tiers import Tier, Tiers

KILO = 1024


def segment(name: str, kilobytes: int = 1) -> Segment:
    return Segment(name, (1,), (), (KeptLayer((1,), (0,), 1, 1),), torch.zeros(256 * kilobytes))


def tiers(device: int | None, host: int | None, backed=lambda address: False) -> Tiers:
    return Tiers(torch.device("cpu"), device, host, backed)


def test_what_was_not_used_for_longest_leaves():
    there = tiers(3 * KILO, 2 * KILO)
    for name in "abc":
        there.put(segment(name))
    assert there.take("a") is not None
    there.put(segment("d"))  # b makes room
    assert list(there.on_device) == ["c", "a", "d"]
    assert list(there.on_host) == ["b"]
    assert there.take("b") is not None  # and comes back in place of c
    assert list(there.on_device) == ["a", "d", "b"]
    assert there.counts.hits == {"device": 1, "host": 1}
    assert there.counts.evicted == Counter(device=2)
    assert there.nbytes == {"device": 3 * KILO, "host": 2 * KILO}
    assert "c" in there
    assert there.take("e") is None


def test_what_leaves_the_last_place_is_lost_unless_it_is_on_disk():
    there = tiers(KILO, KILO, backed=lambda address: address == "a")
    for name in "abcd":
        there.put(segment(name))
    assert there.counts.lost == 1
    assert [name in there for name in "abcd"] == [False, False, True, True]


def test_a_segment_too_large_for_the_device_stays_on_the_host():
    there = tiers(KILO, 8 * KILO)
    there.put(segment("large", 4))
    there.put(segment("small"))
    assert there.take("large") is not None
    assert list(there.on_device) == ["small"]
    assert list(there.on_host) == ["large"]
    there.put(segment("huge", 9))
    assert "huge" not in there
    assert there.counts.lost == 1


def test_bytes_are_those_of_what_is_held():
    tier = Tier("device", 4 * KILO)
    there = tiers(None, None)
    for name, kilobytes in [("a", 1), ("b", 2), ("a", 1), ("c", 3), ("d", 4)]:
        held = there.put(segment(name, kilobytes))
        tier.put(held)
        assert tier.nbytes == sum(tier._held[x].segment.nbytes for x in tier) <= 4 * KILO
    assert len(tier) == 1
    assert there.nbytes["device"] == 10 * KILO
    there.drop("d")
    assert there.nbytes["device"] == 6 * KILO


def test_a_host_copy_is_had_without_making_room():
    there = tiers(0, 0)
    held = there.put(segment("a"))
    assert there.host_copy(held).data.device.type == "cpu"
    assert there.nbytes == {"device": 0, "host": 0}


def test_counts_are_added_to_from_any_thread():
    counts = Counts()
    with ThreadPoolExecutor(4) as threads:
        for _ in range(400):
            threads.submit(counts.add, "lost")
            threads.submit(counts.add, "hits", 2, "remote")
    counts.add("evicted", 0, "disk")
    assert (counts.lost, counts.hits, counts.evicted) == (400, {"remote": 800}, {})
    assert str(counts).startswith("0 computed, hits 800 from remote")
