"""Who is read, decoded, preempted or waits: bookkeeping over numbers, without a tensor in sight.

Sequences are served by rank: higher priority first, and within one first come, first served. Whoever comes first waits
for pages in front of all others, so that nobody is passed over; a sequence that must grow takes pages of parked
prefixes, then of sequences behind it. The first in rank therefore always gets on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .paging import Memory
from .request import Request, State

# Tokens beyond its prompt that a sequence has room for when it begins, so that it is not preempted at once.
AHEAD = 64
# Tokens for which it gets pages at once later on, where nobody waits and all that run could have as many.
FAR = 512


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    Attributes:
        request: Whose it is.
        tokens: Ids of the prompt and of the answer, as far as the host knows them.
        done: Tokens whose keys and values are held (or will be, when what was launched has run).
        sampled: Tokens of the answer that were chosen, known to the host or not yet.
        reserved: Tokens that there are pages for.
        seat: Its place in the batch, while it has one.
        held: What the memory holds of it.
        swapped: Whether that is on the host.
        after: The sequence whose prompt is the same, and must have been read before this one begins.
        assembling: Stored segments on their way into what is held.
    """

    request: Request
    tokens: list[int]
    done: int = 0
    sampled: int = 0
    reserved: int = 0
    seat: int | None = None
    held: Any = None
    swapped: bool = False
    after: Sequence | None = None
    assembling: Any = None
    chooser: Any = None
    stopper: Any = None

    def __repr__(self) -> str:
        return f"Sequence({self.request!r}, {self.done} held)"  # and no text of anybody's

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller ranks are served first."""
        return -self.request.priority, self.request.number

    @property
    def longest(self) -> int:
        """Tokens that it will hold at most; the last of all is not read."""
        return len(self.request.prompt) + self.request.sampling.max_new_tokens - 1

    @property
    def unread(self) -> int:
        """Known tokens that are not held yet; one where the next is decoded."""
        return len(self.tokens) - self.done

    @property
    def reads(self) -> bool:
        """Whether there are tokens to read in front of those to decode."""
        return not self.sampled or len(self.tokens) - self.done > 1

    @property
    def decodes(self) -> bool:
        """Whether a next token is to be had; where all have been chosen, the host need only hear of the last."""
        return not self.reads and self.sampled < self.request.sampling.max_new_tokens


@dataclass
class Work:
    """What a step does.

    Attributes:
        decode: Sequences that get a token each.
        chunks: Sequences that read on, and how many tokens.
    """

    decode: list[Sequence] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)


class Scheduler:
    """Plans steps.

    Args:
        memory: Pages.
        seats: Sequences that have pages at most.
        chunk: Tokens of prompts that are read in a step at most.
        preempt: `"swap"`, `"recompute"`, or `None`: all pages that a request may need are reserved before it begins.
        settle: Waits for what was launched, which may end sequences; called before any are preempted.

    Attributes:
        ahead: Tokens beyond its prompt that a sequence has room for when it begins.
    """

    def __init__(
        self, memory: Memory, seats: int, chunk: int, preempt: str | None, settle: Callable[[], None]
    ) -> None:
        self.memory, self.chunk, self.preempt, self.settle = memory, chunk, preempt, settle
        self.ahead = AHEAD
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.seats = seats
        self.free_seats = list(range(seats - 1, -1, -1))
        self.preemptions = {"swap": 0, "recompute": 0}
        self._stuck: tuple[Sequence, int, int] | None = None

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence wait for its turn."""
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is, and takes its pages."""
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.memory.release(sequence)

    def given_up(self, now: float) -> Iterator[tuple[Sequence, str]]:
        """Sequences that are cancelled, or late at a time of `time.monotonic`, and which."""
        for sequence in (*self.waiting, *self.running):
            request = sequence.request
            if request.cancelling:
                yield sequence, "cancelled"
            elif request.deadline is not None and now > request.deadline:
                yield sequence, "deadline"

    def plan(self) -> Work:
        """What to do next; pages for it are reserved."""
        growing = [x for x in self.running if x.done >= x.reserved and x.decodes]
        for sequence in sorted(growing, key=lambda x: x.rank):
            if sequence in self.running and sequence.decodes:  # those before it may have taken its pages
                self._make_room(sequence, sequence.done + 1)
        self._admit()
        self._look_ahead()
        work, reading = Work(), []
        for sequence in self.running:
            if sequence.reads:
                reading.append(sequence)
            elif sequence.decodes:
                work.decode.append(sequence)
        left = self.chunk
        for sequence in sorted(reading, key=lambda x: x.rank):
            count = min(sequence.unread, left)
            if count:
                work.chunks.append((sequence, count))
            left -= count
        return work

    def _look_ahead(self) -> None:
        """Gives pages before they are needed: to those that begin at once, and to the others one after another.

        Those that have begun together would else need them in the same step, which all would wait for.
        """
        few = -(-len(self.running) // AHEAD)
        for sequence in self.running:
            if sequence.reserved - len(sequence.tokens) > AHEAD or sequence.reserved >= sequence.longest:
                continue
            few -= bool(sequence.sampled)
            if few < 0 or not self._grow_far(sequence, sequence.reserved + 1):
                return

    def _admit(self) -> None:
        """Seats those that wait, in order, as long as there is room for the next."""
        at = 0
        while at < len(self.waiting):
            sequence = self.waiting[at]
            if self._blocked(sequence):  # whoever it waits for is served before, so this lets nobody by for long
                at += 1
                continue
            if not self.free_seats and not self._yields(sequence):
                return
            now = (sequence, self.memory.freed, len(self.free_seats))
            if now == self._stuck:
                return
            if not self._seat(sequence):
                self._stuck = (sequence, self.memory.freed, len(self.free_seats))
                return

    def _blocked(self, sequence: Sequence) -> bool:
        first = sequence.after
        return first is not None and not first.request.state.ended and not first.sampled

    def _seat(self, sequence: Sequence) -> bool:
        if not sequence.swapped:
            sequence.done = self.memory.begin(sequence)
        tokens = sequence.longest if self.preempt is None else min(len(sequence.tokens) + self.ahead, sequence.longest)
        while not self.memory.fits(sequence, tokens):
            if not self.memory.evict() and not self._yields(sequence):
                if not sequence.swapped:
                    self.memory.release(sequence)
                    sequence.done = 0
                return False
        if not self.free_seats:  # someone's pages were settled, and nobody left
            return False
        if sequence.swapped:
            self.memory.swap_in(sequence)
            sequence.swapped = False
        self.memory.grow(sequence, tokens)
        self.waiting.remove(sequence)
        sequence.seat = self.free_seats.pop()
        self.running.append(sequence)
        sequence.request.state = State.READING if not sequence.sampled else State.DECODING
        return True

    def _yields(self, sequence: Sequence) -> bool:
        """Whether someone of lower priority has made room for one that waits."""
        behind = [x for x in self.running if x.request.priority < sequence.request.priority]
        return self.preempt is not None and bool(behind) and self._preempt(max(behind, key=lambda x: x.rank))

    def _make_room(self, sequence: Sequence, tokens: int) -> None:
        """Gives a running sequence pages, if need be those of others behind it, or else lets it wait."""
        if tokens <= sequence.reserved:
            return
        if self._grow_far(sequence, tokens):
            return
        while not self.memory.fits(sequence, tokens):
            if self.memory.evict():
                continue
            last = max(self.running, key=lambda x: x.rank)
            if not self._preempt(last) or last is sequence or sequence not in self.running:
                return
        self.memory.grow(sequence, tokens)

    def _grow_far(self, sequence: Sequence, tokens: int) -> bool:
        """Gives a sequence pages for many tokens more, where nobody waits and all that run could have as many."""
        if self.waiting:
            return False
        more = sum(min(max(x.longest - x.reserved, 0), FAR) for x in self.running)
        far = self.memory.fits(sequence, tokens + more)
        if far:
            self.memory.grow(sequence, min(tokens + FAR, sequence.longest))
        return far

    def _preempt(self, sequence: Sequence) -> bool:
        """Takes the pages of a sequence, which goes on later; whether there is anything to be had by it."""
        self.settle()
        if sequence not in self.running:  # it ended meanwhile
            return True
        self._leave(sequence)
        how = "swap" if self.preempt == "swap" and sequence.sampled and self.memory.swap_out(sequence) else "recompute"
        if how == "swap":
            sequence.swapped, sequence.reserved = True, 0
        else:
            self.memory.release(sequence)
            sequence.done = 0
        self.preemptions[how] += 1
        sequence.request.preempted += 1
        self._wait(sequence)
        return True

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        assert sequence.seat is not None
        self.free_seats.append(sequence.seat)
        self.free_seats.sort(reverse=True)
        sequence.seat = None

    def _wait(self, sequence: Sequence) -> None:
        sequence.request.state = State.WAITING
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda x: x.rank)
