"""A step as data: which of its tokens a group takes."""

import torch

from redknot_hf.cache.step import Group, Step

KEYS = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)


def test_a_group_of_everything_takes_a_tensor_as_it_is():
    taken = Group(slice(0, 2), None).take(KEYS)
    assert torch.equal(taken, KEYS)
    assert taken.data_ptr() == KEYS.data_ptr()  # and copies nothing


def test_a_group_of_one_sequence_takes_its_real_tokens_in_order():
    taken = Group(slice(1, 2), torch.tensor([1, 3, 4])).take(KEYS)
    assert torch.equal(taken, KEYS[1:2, :, [1, 3, 4]])


def test_a_new_step_is_not_written_and_is_attended_by_its_storage():
    step, other = (Step(None, KEYS, KEYS, tokens=5, start=7) for _ in range(2))  # pyright: ignore
    assert (step.written, step.real, step.attend) == (False, None, None)
    step.groups.append(Group(slice(0, 2), None))
    assert other.groups == []  # each has its own
