"""Cold pages in a storage: every step is attention over what rows hold, which are few bits behind the hot tail."""

import gc
import pickle

import numpy as np
import pytest
import torch
from cold_storage import HEADS, HOT, PAGE, Held
from redknot_kernels import UNBOUNDED

from redknot_hf.cache.cold import ColdRows

IMPLS = ["torch", "triton"]


@pytest.mark.parametrize("reserved", [None, 300])
@pytest.mark.parametrize("impl", IMPLS)
def test_every_step_is_attention_over_hot_and_cold_pages(impl, reserved):
    held = Held(impl, reserved=reserved)
    for tokens in (70, 1, 16, 5, 60, 1):
        held.step(tokens)
        held.check()
    assert held.storage.cold.counts.tolist() == [held.storage.rows.rules.cold_pages(153)] * 2
    if reserved is None:
        held.check_bytes()


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_and_rows_of_any_length(impl):
    held = Held(impl, batch=3)
    held.step(70, torch.arange(70) >= torch.tensor([[0], [9], [50]]))
    for seed in range(2):
        for tokens in (9, 30):
            chance = torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed))
            real = chance < torch.tensor([[1], [0.5], [0]])
            held.step(tokens, real)
            held.check()
    assert len(set(held.storage.cold.counts.tolist())) > 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reserved", [None, 300])
def test_a_cut_within_the_hot_tail_is_exact_and_one_beyond_is_told(impl, reserved):
    held = Held(impl, reserved=reserved, heads=[head for head in HEADS if head[0] == UNBOUNDED])
    held.step(100)
    cold = held.storage.cold.counts.copy()
    assert held.storage.missing_after_cut(HOT) == 0
    assert held.storage.missing_after_cut(HOT + PAGE) > 0
    assert held.storage.missing_after_cut(100) == 0
    held.cut(HOT)
    held.check()
    for tokens in (1, 5):
        held.step(tokens)
        held.check()
    assert (held.storage.cold.counts == cold).all()
    held.cut(held.keys[0].shape[1] - PAGE)  # the first page is as it was
    assert held.storage.cold.counts.tolist() == [0, 0]
    held.step(70)
    held.check()


@pytest.mark.parametrize("impl", ["torch"])
@pytest.mark.parametrize("reserved", [None, 300])
def test_forks_go_their_own_way(impl, reserved):
    held = Held(impl, reserved=reserved)
    held.step(90)
    before = held.held(0)
    fork = held.fork()
    fork.generator = torch.Generator().manual_seed(7)
    for tokens in (1, 16, 40, 16):
        fork.step(tokens)
        held.step(tokens)
        held.check()
        fork.check()
    assert torch.equal(held.held(0)[0][:, :30], before[0][:, :30])
    del fork
    gc.collect()
    held.step(1)
    held.check()
    if reserved is None:
        held.storage.cut(0)
        held.check_bytes()


def test_beams_and_selected_sequences():
    held = Held()
    held.step(90)
    held.select([1, 1, 0])
    for tokens in (1, 30, 5):
        held.step(tokens)
        held.check()
    held.select([2], shrink=True)
    held.check()
    held.check_bytes()
    held.step(20)
    held.check()


@pytest.mark.parametrize("reserved", [None, 200])
def test_a_pickle_holds_its_own_pages(reserved):
    held = Held(reserved=reserved)
    held.step(90)
    fork = held.fork()
    fork.select([1, 0])
    sent = fork.copy_of(pickle.loads(pickle.dumps(fork.storage)))
    sent.check()
    sent.step(20)
    sent.check()
    held.check()


def test_what_is_cleared_begins_anew():
    held = Held(reserved=200)
    held.step(90)
    held.storage.clear()
    assert not any(page.any() for page in held.storage.cold.pages)
    held.keys, held.values = ([x[:, :0] for x in part] for part in (held.keys, held.values))
    held.step(80)
    held.check()


def test_how_many_pages_are_cold_and_how_far_a_cut_may_reach():
    held = Held("torch")
    held.step(70)
    held.step(60)
    cold, pages = held.storage.cold, held.storage.rows.rules.cold_pages(130)
    assert isinstance(cold, ColdRows)
    assert pages > 0
    assert cold.lengths(np.array([130, 130])).tolist() == [pages * PAGE] * 2
    lowest = (pages + 1) * PAGE  # the first page is hot
    assert [cold.missing_after(np.array([lowest - n, 130])) for n in (0, 3)] == [0, 3]
    assert cold.missing_after(np.array([PAGE, 130])) == 0  # cut back to the first page, nothing is cold any more
