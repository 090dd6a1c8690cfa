"""The rule of routing: segments first, then prefixes, then load; spill where a replica is full."""

import random
from dataclasses import replace

import pytest

from redknot_hf.serving.routing import BLOCK, Replica, marks, ranked

TEXT = list(range(3 * BLOCK + 5))
A = Replica("a", load=3, segments={"x": 10, "y": 10}, prefixes=marks(TEXT[:BLOCK]))
B = Replica("b", load=2, segments={"z": 15}, prefixes=marks(TEXT))
C = Replica("c", load=1)


def names(*args) -> str:
    return "".join(replica.name for replica in ranked([C, A, B], *args))


@pytest.mark.parametrize(
    ("segments", "prompt", "expected"),
    [
        ((), (), "cba"),  # the least loaded
        (("x",), (), "acb"),
        (("x", "z"), (), "bac"),  # bytes, not numbers
        (("x", "y", "z"), (), "abc"),
        (("x", "x", "z"), (), "bac"),  # a segment twice is fetched once
        ((), TEXT, "bac"),  # the longer prefix
        ((), TEXT[: 2 * BLOCK - 1], "bac"),  # as long in both: load
        ((), TEXT[: BLOCK - 1], "cba"),
        (("x",), TEXT, "abc"),  # segments before prefixes
        (("unknown",), (), "cba"),
    ],
)
def test_a_request_goes_where_most_of_it_is(segments, prompt, expected):
    assert names(segments, prompt) == expected


def test_a_full_replica_is_the_last_to_be_asked():
    full = replace(A, most=3)
    assert full.full
    assert [one.name for one in ranked([full, B, C], ("x", "y"))] == ["c", "b", "a"]
    assert [one.name for one in ranked([replace(A, most=4), B, C], ("x", "y"))] == ["a", "c", "b"]
    assert ranked([], ("x",)) == []


def test_marks_tell_texts_apart_by_all_that_stands_before():
    other = [7, *TEXT[1:]]
    assert len(marks(TEXT)) == 3
    assert marks(TEXT)[:1] == marks(TEXT[: BLOCK + 1])
    assert not set(marks(TEXT)) & set(marks(other))
    assert marks(TEXT, block=10)[0] != marks(TEXT)[0]


def test_requests_go_to_who_holds_their_segments():
    """Two replicas, groups of documents, and what each replica has learnt: nine of ten requests find theirs."""
    draw, held, load = random.Random(0), {"a": {}, "b": {}}, {"a": 0, "b": 0}
    found = 0
    for _ in range(400):
        group = draw.randrange(12)
        wanted = [f"{group}.{i}" for i in range(3)]
        best = ranked([Replica(name, load[name], 4, dict(held[name])) for name in held], wanted)[0]
        found += all(address in held[best.name] for address in wanted)
        held[best.name].update(dict.fromkeys(wanted, 1))
        load[best.name] = min(load[best.name] + 1, 3)
        done = draw.choice("ab")
        load[done] = max(load[done] - 2, 0)
    assert found >= 0.9 * 400
    assert held["a"]
    assert held["b"]
