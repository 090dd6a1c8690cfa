"""Which slots were padding."""

import pytest
import torch

from redknot_hf.cache.history import SlotHistory


def padded_history():
    """Two sequences over 3 + 4 + 5 slots; the step of 4 is padding first for the second one."""
    history = SlotHistory()
    history.add(2)
    history.add(1)
    history.add(torch.tensor([[True, True, True, True], [False, False, True, True]]))
    history.add(5)
    return history


def test_slots_and_padding_are_counted():
    history = padded_history()
    assert history.slots == 12
    assert history.padded
    assert not SlotHistory().padded


@pytest.mark.parametrize(
    ("slots", "real"), [(0, [0, 0]), (5, [5, 5]), (7, [7, 7]), (8, [8, 7]), (9, [9, 7]), (12, [12, 10])]
)
def test_real_tokens_among_the_last_slots(slots, real):
    history = padded_history()
    assert history.real_among_last(slots, 2).tolist() == real
    history.drop_last(slots)
    assert history.slots == 12 - slots
    assert history.padded == (slots < 9)


def test_select_and_fork():
    history = padded_history()
    fork = history.fork()
    fork.select(torch.tensor([1, 1, 0]))
    fork.add(1)
    assert fork.real_among_last(13, 3).tolist() == [11, 11, 13]
    assert history.real_among_last(12, 2).tolist() == [12, 10]


def test_padding_is_forgotten_with_the_sequences_that_had_it():
    history = padded_history()
    history.forget_padding()
    assert history.padded
    history.select(torch.tensor([0, 0]))
    history.forget_padding()
    assert not history.padded
    assert history.real_among_last(12, 2).tolist() == [12, 12]
