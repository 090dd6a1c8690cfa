"""Parts of the engine by themselves: what memory buys, which prefixes stay, how tokens are chosen together."""

import numpy as np
import pytest
import torch
from families import make_model
from served import SIZES, all_free, alone, prompts_of

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.serving.admission import check_arguments
from redknot_hf.serving.batch import Seats
from redknot_hf.serving.capturing import CapturedStep
from redknot_hf.serving.engine import Engine
from redknot_hf.serving.inbox import Inbox, QueueFullError
from redknot_hf.serving.memory import SeatMemory
from redknot_hf.serving.prefixes import Prefixes
from redknot_hf.serving.reading import Reader
from redknot_hf.serving.request import Request, Sampling
from redknot_hf.serving.sampling import Chooser, Refusals, choose, settle, warp
from redknot_hf.serving.scheduler import Sequence, Work
from redknot_hf.serving.sizes import bought, bytes_of, is_share


@pytest.fixture(scope="module")
def model():
    return make_model("gemma4")  # layers of other widths, and some that share keys


@pytest.mark.parametrize("memory", [400_000, "1MiB", "0.5GiB"])
def test_a_budget_is_kept_and_spent(model, memory):
    plan = HeadPlan.with_global(model.config, [(1, 1), (1, 0)], HeadSpec(20, 2))
    held = SeatMemory(model, plan, memory, 3, 512, page_size=16)
    asked = {"1MiB": 1 << 20, "0.5GiB": 1 << 29}.get(memory, memory)
    total = held.used()["total"]
    assert total == held.sizes.nbytes <= asked
    assert held.used()["used"] == 0
    most = held.sizes.needs(512) * 3 * 2
    assert total + held.sizes.column + held.sizes.ring > min(asked, most)
    assert held.needs(512) <= held.sizes.needs(512)


def test_shares_are_of_what_is_free(model):
    plan = HeadPlan.uniform(model.config, HeadSpec())
    assert SeatMemory(model, plan, 0.5, 2, 64, page_size=16).used()["total"] > 0
    assert bytes_of("2KiB", torch.device("cpu")) == 2048
    with pytest.raises(ValueError, match="memory=0"):
        SeatMemory(model, plan, 0, 2, 64)


def test_parking_needs_room_for_whoever_goes_on(model):
    """A sequence that could not go on beside its own prefix keeps its pages to itself."""
    plan = HeadPlan.uniform(model.config, HeadSpec(20, 2))
    held = SeatMemory(model, plan, 1 << 22, 2, 128, page_size=16, parked=0.9)
    sequence = Sequence(Request([5] * 40, Sampling()), [5] * 40)
    sequence.done = held.begin(sequence)
    held.grow(sequence, 40)
    with torch.no_grad():
        model(torch.tensor([[5] * 40]), use_cache=True, **{held.name: sequence.held})
    sequence.done = 40
    held.park(sequence)
    assert len(held.prefixes) == 1
    held.park(sequence)
    assert len(held.prefixes) == 1
    assert held.fits(sequence, 48)
    others = []
    while True:
        other = Sequence(Request([6], Sampling()), [6])
        held.begin(other)
        if not held.fits(other, 64):
            break
        held.grow(other, 64)
        others.append(other)
    sequence.tokens, sequence.done = [5] * 40, 39
    held.park(sequence)
    assert len(held.prefixes) == 1
    held.release(sequence)
    for other in others:
        held.release(other)
    assert held.evict()
    assert not held.evict()
    assert held.used()["used"] == 0


def test_prefixes_go_least_recently_used_first():
    prefixes = Prefixes(most=100, block=4, reaches=lambda cache, cut: True)
    texts = [[i] * 4 + list(range(10)) for i in range(4)]
    for text in texts[:3]:
        assert prefixes.wants(text)
        assert prefixes.add(text, None, 30) == []
    assert not prefixes.wants(texts[0])
    assert not prefixes.wants([1, 2, 3])
    entry, common = prefixes.find([*texts[0], 77])
    assert (entry.ids.tolist(), common) == (texts[0], 14)
    assert prefixes.find(texts[0])[1] == 13
    assert prefixes.find([9, 9, 9, 9, 9]) is None
    gone = prefixes.add(texts[3], None, 30)
    assert [x.ids.tolist() for x in gone] == [texts[1]]
    assert prefixes.nbytes == 90
    assert [x.ids.tolist() for x in prefixes.add([1] * 9, None, 101)] == [[1] * 9]
    assert [prefixes.pop().ids.tolist() for _ in range(3)] == [texts[2], texts[0], texts[3]]
    assert prefixes.pop() is None
    assert prefixes.nbytes == 0


def test_the_longest_prefix_is_found():
    prefixes = Prefixes(most=100, block=4, reaches=lambda cache, cut: True)
    for length in (5, 20, 10):
        prefixes.add(list(range(length)), None, 1)
    assert prefixes.find(list(range(30)))[1] == 20
    assert prefixes.find(list(range(12)))[1] == 11  # the last token is read: its logits are wanted
    assert prefixes.hit_tokens == 31


def test_rows_of_logits_are_warped_each_in_its_own_way():
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    asked = [
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=7),
        Sampling(temperature=2.0, top_p=0.5),
        Sampling(temperature=1.0, min_p=0.3),
        Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05),
    ]
    found = warp(logits, asked)
    for i, how in enumerate(asked):
        row = TemperatureLogitsWarper(how.temperature)(None, logits[i : i + 1])
        if how.top_k:
            row = TopKLogitsWarper(how.top_k)(None, row)
        if how.top_p < 1:
            row = TopPLogitsWarper(how.top_p)(None, row)
        if how.min_p:
            row = MinPLogitsWarper(how.min_p)(None, row)
        assert torch.equal(row[0].isneginf(), found[i].isneginf())
        torch.testing.assert_close(row[0], found[i])


def test_a_seed_draws_the_same_in_any_company():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    make = lambda seed: Chooser(Sampling(temperature=1.0, seed=seed), [1], cpu)  # noqa: E731
    alone, among = make(5), make(5)
    other = Chooser(Sampling(temperature=1.0), [1], cpu)
    greedy = Chooser(Sampling(), [1], cpu)
    for _ in range(10):
        one = choose(logits[1:2], [alone])
        three = choose(logits, [other, among, greedy])
        assert int(one[0]) == int(three[1])
        assert int(three[2]) == int(logits[2].argmax())


def test_who_cannot_choose_is_named():
    def broken(ids, scores):
        raise KeyError

    cpu = torch.device("cpu")
    choosers = [Chooser(Sampling(processors=p), [1], cpu) for p in ((), (broken,), (lambda i, s: s * torch.nan,))]
    with pytest.raises(Refusals) as told:
        choose(torch.zeros(3, 9), choosers)
    assert sorted(told.value.errors) == [1, 2]
    assert settle(told.value.scores, choosers[:1]).tolist() == [0]


def test_seats_take_tables_only_where_they_changed(model):
    held = SeatMemory(model, HeadPlan.uniform(model.config, HeadSpec()), 1 << 20, 2, 128, page_size=16)
    seats = Seats(held, 2, 128, capture=True)
    assert not seats.captures
    sequence = Sequence(Request([5] * 10, Sampling()), [5] * 11, done=10, seat=1)
    held.begin(sequence)
    held.grow(sequence, 11)
    seats.place(sequence, None)
    assert seats.numbers.lengths.tolist() == [0, 10]
    assert seats.numbers.last.tolist() == [0, 5]
    (table,) = seats.tables.flat.values()
    copied = table.clone()
    table.zero_()
    seats.place(sequence, None)
    assert not table.any()
    held.grow(sequence, 30)
    seats.place(sequence, torch.tensor([7]))
    assert (table >= copied).all()
    assert seats.numbers.last.tolist() == [0, 7]
    reader = Reader(held, seats, lambda *_: None, 64)
    reader.run(Work())
    assert not reader.pending


def test_steps_as_they_are_captured_have_the_tokens_of_generate(model):
    plan = HeadPlan.with_global(model.config, [(1, 1), (1, 0)], HeadSpec(20, 2)).stored("int8", heads=[(1, 1)])
    asked = prompts_of(8, 3, longest=20)[0][:3]
    engine = Engine(model, plan, **SIZES)
    engine.reader.seats.captures = True  # on a device without graphs replays are steps
    answers = engine.generate(asked, [Sampling(max_new_tokens=n) for n in (9, 3, 6)])
    assert [x.error for x in answers] == [None] * 3
    assert [x.ids for x in answers] == [alone(model, plan, x, n) for x, n in zip(asked, (9, 3, 6), strict=True)]
    assert {*engine.reader.seats.graphs} == {1, 2, 4}  # as prompts have been read and answers end
    assert all(isinstance(step, CapturedStep) for step in engine.reader.seats.graphs.values())
    assert engine.reader.seats.replays >= 8
    assert all_free(engine)


def test_arguments_mean_something(model):
    config = model.config
    check_arguments(config, 10, (1, 1, 1, 1), None, 0)
    with pytest.raises(ValueError, match="max_len=0"):
        check_arguments(config, 0, (1, 1, 1, 1), None, 0)


def test_an_engine_takes_the_file_of_a_plan(model, tmp_path):
    HeadPlan.uniform(model.config, HeadSpec()).save(tmp_path / "plan.json")
    engine = Engine(model, tmp_path / "plan.json", memory=1 << 21, max_len=64, page_size=16)
    assert np.array(engine.generate([[5, 6]], Sampling(3))[0].ids).shape == (3,)


def test_an_inbox_keeps_groups_together_and_has_an_end():
    inbox = Inbox(4)
    made = [Sequence(Request([3], Sampling()), [3]) for _ in range(4)]
    inbox.put(made[:2], 0)
    with pytest.raises(QueueFullError, match="4 requests wait, and at most 4 may"):
        inbox.put(made[2:3], 2)
    inbox.put(made[2:], 0)
    assert len(inbox) == 4
    inbox.wait(60)  # something lies there
    assert [*inbox.take()] == made
    assert len(inbox) == 0
    inbox.close("it is being shut down")
    with pytest.raises(RuntimeError, match="takes no requests any more: it is being shut down"):
        inbox.put(made, 0)


@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_tables_of_layers_in_two_places(family, monkeypatch):
    """Stands for two devices: both are the host, and the engine keeps them apart."""
    model = make_model(family)
    plan = HeadPlan.with_global(model.config, [(1, 1), (1, 0), (0, 1)], HeadSpec(20, 2)).stored("int8", [(1, 0)])
    prompts, new = [[*range(3, 60)], [*range(9, 30)], [5]], 9
    expected = [x.ids for x in Engine(model, plan, **SIZES).generate(prompts, Sampling(new))]
    halves = lambda x: ((torch.device("cpu"), range(1)), (torch.device("cpu:0"), range(1, 4)))  # noqa: E731
    monkeypatch.setattr(
        SeatMemory, "places", lambda x: {d: {i: x.layers[i] for i in part if i in x.layers} for d, part in halves(x)}
    )
    engine = Engine(model, plan, **SIZES)
    assert len(engine.reader.seats.tables.flat) == 2
    assert [x.ids for x in engine.generate(prompts, Sampling(new))] == expected
    assert all_free(engine)


def test_what_memory_buys_is_what_the_scarcest_device_has_room_for():
    alone = bought([(1000, 10, 5)], 8, 100, 1, int)
    assert alone == (8, 184)
    assert bought([(1000, 10, 5), (300, 10, 5)], 8, 100, 1, int) == (8, 44)
    assert bought([(1000, 10, 5), (30, 10, 0)], 8, 100, 1, int) == (3, 194)
    assert bought([(1000, 10, 5)], 8, 100, 1, lambda mine: min(mine, 6)) == (6, 6)
    assert bought([(1000, 0, 5)], 8, 10, 1, int) == (8, 80)
    assert is_share("0.5")
    assert not is_share("2KiB")
