"""Checks that remember: what was right before excuses no other call."""

from dataclasses import dataclass
from typing import Literal

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, BeartypeStrategy, beartype
from jaxtyping import Float, Int
from torch import Tensor

every = BeartypeConf(strategy=BeartypeStrategy.On, violation_type=TypeError)
checked = jaxtyping.jaxtyped(typechecker=beartype(conf=every))


@checked
def rows_of(
    table: Float[Tensor, "rows dim"],
    places: list[Int[Tensor, " rows"]],
    cut: int = 0,
    how: Literal["whole", "part"] = "whole",
    named: dict[str, int] | None = None,
) -> Float[Tensor, "rows dim"]:
    return table[cut:]


@checked
@dataclass
class Held:
    keys: Float[Tensor, "tokens dim"]
    values: Float[Tensor, "tokens dim"]


TABLE, PLACES = torch.zeros(3, 4), [torch.zeros(3, dtype=torch.long)] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"table": torch.zeros(2, 4)},
        {"table": torch.zeros(3, 4, dtype=torch.long)},
        {"table": torch.zeros(3)},
        {"places": [torch.zeros(2, dtype=torch.long)] * 2},
        {"places": tuple(PLACES)},
        {"how": "half"},
        {"cut": None},
        {"named": {"b": 1.5, "a": 1}},  # of a mapping its first item is looked at
        {"cut": 1},  # the answer is shorter
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_call_is_told_after_right_ones(wrong):
    right = {"table": TABLE, "places": PLACES, "cut": 0, "how": "part", "named": {"a": 1, "b": 1.5}}
    for _ in range(2):
        assert rows_of(**right) is not None
        assert rows_of(TABLE, PLACES) is not None
        with pytest.raises(TypeError, match="Type-check error"):
            rows_of(**(right | wrong))
    assert torch.equal(rows_of(**right), TABLE)


def test_another_answer_to_the_same_kinds_is_checked_and_given_back():
    calls = []

    @checked
    def turns(text: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"] | None:
        calls.append(text)
        return (text, None, text, text[1:])[len(calls) - 1]

    text = torch.ones(2)
    assert turns(text) is text
    assert turns(text) is None
    assert turns(text) is text
    with pytest.raises(TypeError, match="return value"):
        turns(text)
    assert len(calls) == 4


def test_data_of_other_shapes_is_told():
    Held(TABLE, TABLE)
    with pytest.raises(TypeError, match="values"):
        Held(TABLE, TABLE[1:])


def test_of_a_list_of_several_kinds_another_is_looked_at_each_time():
    places, told = [*PLACES, torch.zeros(2, dtype=torch.long)], 0
    for _ in range(40):
        try:
            rows_of(TABLE, places)
        except TypeError:
            told += 1
    assert told > 1  # of three one: about 13 times
