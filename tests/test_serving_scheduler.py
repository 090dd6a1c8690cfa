"""The scheduler alone, over pages that are mere numbers: random arrivals, lengths, cancellations and priorities."""

import random

import pytest

from redknot_hf.serving.request import Request, Sampling, State
from redknot_hf.serving.scheduler import Scheduler, Sequence

PAGE = 4


class Pages:
    """A memory of counted pages. Parked prefixes share pages with whoever wrote them; a sequence copies its last."""

    def __init__(self, pages, host):
        self.free, self.host, self.freed = list(range(pages)), host, 0
        self.listed = [0] * pages
        self.parked = []

    def take(self, count):
        assert count <= len(self.free), "served pages that are not there"
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            assert self.listed[page] == 0, "a page was served twice"
            self.listed[page] = 1
        return taken

    def give(self, pages):
        self.freed += 1
        for page in pages:
            self.listed[page] -= 1
            assert self.listed[page] >= 0
            if not self.listed[page]:
                self.free.append(page)

    def begin(self, sequence):
        sequence.held, sequence.reserved = [], 0
        for ids, pages in self.parked:
            if len(ids) < len(sequence.tokens) and sequence.tokens[: len(ids)] == ids:
                sequence.held = list(pages)
                for page in pages:
                    self.listed[page] += 1
                return len(ids)
        return 0

    def _missing(self, sequence, tokens):
        held = [] if sequence.swapped else sequence.held
        own = [p for p in held[sequence.done // PAGE :] if self.listed[p] > 1]
        return max(-(-tokens // PAGE) - len(held), 0), own

    def fits(self, sequence, tokens):
        more, copied = self._missing(sequence, tokens)
        return more + len(copied) <= len(self.free)

    def grow(self, sequence, tokens):
        more, copied = self._missing(sequence, tokens)
        for page in copied:
            sequence.held[sequence.held.index(page)] = self.take(1)[0]
            self.give([page])
        sequence.held += self.take(more)
        sequence.reserved = len(sequence.held) * PAGE

    def release(self, sequence):
        if sequence.swapped:
            self.host += sequence.held
        elif sequence.held is not None:
            self.give(sequence.held)
        sequence.held, sequence.reserved, sequence.swapped = None, 0, False

    def evict(self):
        if self.parked:
            self.give(self.parked.pop(0)[1])
            return True
        return False

    def swap_out(self, sequence):
        if len(sequence.held) > self.host:
            return False
        self.host -= len(sequence.held)
        count = len(sequence.held)
        self.give(sequence.held)
        sequence.held = count
        return True

    def swap_in(self, sequence):
        self.host += sequence.held
        sequence.held = []

    def park(self, sequence):
        if any(ids == sequence.tokens[: sequence.done] for ids, _ in self.parked):
            return
        pages = sequence.held[: -(-sequence.done // PAGE)]
        for page in pages:
            self.listed[page] += 1
        reserved, sequence.reserved = sequence.reserved, 0
        if self.fits(sequence, reserved):
            self.parked.append((sequence.tokens[: sequence.done], pages))
        else:
            self.give(pages)
        self.grow(sequence, reserved)


class World:
    """A model that answers with numbers; the host hears of them a step late if told to."""

    def __init__(self, seed, preempt, late, pages=40, seats=5):
        self.draw = random.Random(seed)
        self.memory = Pages(pages, host=30 if preempt == "swap" else 0)
        self.scheduler = Scheduler(self.memory, seats, 8, preempt, self.settle)
        self.scheduler.ahead = self.draw.choice((0, 3))
        self.pending, self.late, self.most = [], late, pages * PAGE
        self.live, self.begun, self.served = [], [], 0

    def arrive(self):
        length, new = self.draw.randint(1, 40), self.draw.randint(1, 30)
        start = self.draw.choice((0, 1))
        tokens = [start * 100 + i for i in range(length)]
        request = Request(tokens, Sampling(max_new_tokens=new), priority=self.draw.choice((0, 0, 0, 1)))
        sequence = Sequence(request, list(tokens))
        if self.live and self.draw.random() < 0.1:
            sequence.after = self.live[-1]
        self.live.append(sequence)
        self.scheduler.add(sequence)

    def settle(self):
        for sequence in self.pending:
            if sequence in self.live:
                sequence.tokens.append(1000 + len(sequence.tokens))
                if len(sequence.tokens) == len(sequence.request.prompt) + sequence.request.sampling.max_new_tokens:
                    self.end(sequence, State.DONE)
        self.pending = []

    def end(self, sequence, state):
        self.scheduler.remove(sequence)
        sequence.request.end(state, "length")
        self.live.remove(sequence)
        assert sequence.held is None
        assert sequence.seat is None

    def step(self):
        work = self.scheduler.plan()
        seats = [x.seat for x in self.scheduler.running]
        assert len(set(seats)) == len(seats) <= self.scheduler.seats
        assert sum(count for _, count in work.chunks) <= self.scheduler.chunk + len(seats)
        heard = self.pending if self.late else []
        self.pending = []
        for sequence in work.decode:
            assert sequence.done + 1 <= sequence.reserved
            sequence.done += 1
            sequence.sampled += 1
            self.pending.append(sequence)
        for sequence, count in work.chunks:
            assert sequence.done + count <= sequence.reserved
            if sequence not in self.begun:
                self.begun.append(sequence)
            sequence.done += count
            if not sequence.unread:
                if not sequence.sampled:
                    self.memory.park(sequence)
                sequence.sampled += 1
                self.pending.append(sequence)
        launched, self.pending = self.pending, heard
        self.settle()
        self.pending = [x for x in launched if x in self.live]
        if not self.late or not work:
            self.settle()
        self.check()
        return bool(work)

    def check(self):
        """No page is lost and none is listed more often than it is held."""
        memory, count = self.memory, [0] * len(self.memory.listed)
        for sequence in self.live:
            for page in sequence.held if isinstance(sequence.held, list) else ():
                count[page] += 1
        for _, pages in memory.parked:
            for page in pages:
                count[page] += 1
        assert count == memory.listed
        assert sorted(memory.free) == [page for page, times in enumerate(count) if not times]


@pytest.mark.parametrize("preempt", ["swap", "recompute", None])
@pytest.mark.parametrize("late", [False, True])
def test_no_page_is_lost_and_all_are_served(preempt, late):
    steps = 0
    for seed in range(4):
        world = World(seed, preempt, late)
        for _ in range(1000):
            if world.draw.random() < 0.3:
                world.arrive()
            if world.live and world.draw.random() < 0.03:
                world.end(world.draw.choice(world.live), State.CANCELLED)
            world.step()
            steps += 1
        for _ in range(20_000):  # whoever waits is served in the end
            if not world.live:
                break
            world.step()
            steps += 1
        assert not world.live
        while world.memory.evict():
            pass
        assert len(world.memory.free) == 40
        assert preempt is None or sum(world.scheduler.preemptions.values()) > 0
        assert preempt is not None or not sum(world.scheduler.preemptions.values())
        assert preempt != "swap" or world.memory.host == 30
    assert steps >= 4000


@pytest.mark.parametrize("preempt", ["swap", "recompute", None])
def test_first_come_first_served_within_a_priority(preempt):
    world = World(3, preempt, late=False)
    for _ in range(200):
        world.arrive()
        world.live[-1].after = None
    while world.live:
        world.step()
    for priority in (0, 1):
        begun = [x.request.number for x in world.begun if x.request.priority == priority]
        assert begun == sorted(begun)
    first = [x.request.priority for x in world.begun]
    assert first == sorted(first, reverse=True)


def test_who_comes_first_always_gets_on():
    """The oldest of the highest priority is never preempted."""
    world = World(5, "recompute", late=True, pages=20)
    for _ in range(60):
        world.arrive()
        world.live[-1].request.priority = 0
    while world.live:
        first = min(world.live, key=lambda x: x.rank)
        held = first.done
        world.step()
        if first in world.live and first in world.scheduler.running:
            assert first.done >= held


def test_higher_priority_takes_the_pages_of_lower():
    world = World(7, "swap", late=False, pages=12, seats=2)
    low = [Sequence(Request(list(range(10)), Sampling(max_new_tokens=14)), list(range(10))) for _ in range(2)]
    for sequence in low:
        world.live.append(sequence)
        world.scheduler.add(sequence)
    for _ in range(6):
        world.step()
    urgent = Sequence(Request(list(range(200, 220)), Sampling(max_new_tokens=5), priority=9), list(range(200, 220)))
    world.live.append(urgent)
    world.scheduler.add(urgent)
    while urgent in world.live:
        world.step()
    assert low[0] in world.live
    assert low[1] in world.live
    assert low[1].request.preempted
    while world.live:
        world.step()
