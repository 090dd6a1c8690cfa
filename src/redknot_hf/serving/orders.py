"""Orders: what rank 0 tells the others before a step, so that theirs is the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .request import Request, Sampling
from .scheduler import Scheduler, Sequence


@dataclass(frozen=True)
class New:
    """A request, as those know it who do not choose its tokens.

    Attributes:
        number, prompt, sampling, priority: As the first rank's request has them, but for what chooses.
        answered: What of its answer was there before.
        after: Number of the request whose prompt is the same, and is read before.
    """

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int
    answered: tuple[int, ...]
    after: int | None

    @classmethod
    def of(cls, sequence: Sequence) -> New:
        """Of a sequence that comes in."""
        request, after = sequence.request, sequence.after
        asked = replace(request.sampling, processors=(), logit_bias={}, stop=())
        first = None if after is None else after.request.number
        answered = tuple(sequence.tokens[len(request.prompt) :])
        return cls(request.number, tuple(request.prompt), asked, request.priority, answered, first)

    def made(self, known: Mapping[int, Sequence]) -> Sequence:
        """The same sequence here; one that it waits for may have ended."""
        request = Request(self.prompt, self.sampling, self.priority)
        request.number = self.number
        after = None if self.after is None else known.get(self.after)
        return Sequence(request, [*self.prompt, *self.answered], sampled=len(self.answered), after=after)


@dataclass(frozen=True)
class Orders:
    """What is new before a step.

    Attributes:
        new: Requests that come in.
        gone: Numbers of requests that are given up, and why.
        over: There is no further step.
    """

    new: tuple[New, ...] = ()
    gone: tuple[tuple[int, str], ...] = ()
    over: bool = False

    @classmethod
    def of(cls, new: Iterable[Sequence], gone: Iterable[tuple[Sequence, str]]) -> Orders:
        """Of sequences."""
        return cls(tuple(map(New.of, new)), tuple((sequence.request.number, why) for sequence, why in gone))

    def taken(self, scheduler: Scheduler) -> list[tuple[Sequence, str]]:
        """Lets a scheduler know of what is new; gives the sequences that are given up, and why."""
        known = {x.request.number: x for x in (*scheduler.waiting, *scheduler.running)}
        for new in self.new:
            known[new.number] = new.made(known)
            scheduler.add(known[new.number])
        return [(known[number], why) for number, why in self.gone]
