"""What a step does with the model: chunks of prompts, a token for all that decode, and what was chosen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from warnings import warn

import torch
from jaxtyping import Int
from torch import Tensor

from .batch import Seats
from .chosen import Chosen, on_its_way, told
from .documents import Documents
from .memory import SeatMemory
from .request import State, Token
from .sampling import Chooser, Refusals, Said, choose, log_probabilities, settle
from .scheduler import Sequence as Served
from .scheduler import Work
from .stops import Stopper

Finish = Callable[[Served, State, str, BaseException | None], None]


class Reader:
    """Runs the model for a scheduler.

    Of several ranks the first chooses tokens and says who has ended; in all of them the model runs alike.

    On an accelerator the host is a step behind: it hears of a token when the next step has been launched, so that the
    device need not wait. A sequence that has ended meanwhile has decoded one token for nothing.

    Attributes:
        pending: What the host has not heard of yet.
        read, decoded: Tokens of prompts and of answers.
        reused: Tokens of prompts that were taken from stored segments.

    Args:
        memory: Pages.
        seats: Of the sequences that decode.
        finish: Called when a sequence has ended.
        park_every: Tokens of a prompt after which its beginning is parked.
        documents: Where requests' segments are, if any may have some.
    """

    def __init__(
        self, memory: SeatMemory, seats: Seats, finish: Finish, park_every: int, documents: Documents | None = None
    ) -> None:
        self.memory, self.seats, self.finish, self.park_every = memory, seats, finish, park_every
        self.documents, self.ranks = documents, memory.ranks
        self.behind = 1 if seats.device.type == "cuda" else 0
        self.pending: deque[Chosen] = deque()
        self._parking: deque[Served] = deque()  # whose beginnings are to be kept
        self.read = self.decoded = self.reused = 0
        self.observe: Callable[[str, float], None] = lambda name, value: None

    def begin(self, sequence: Served, ends: Sequence[int], tokenizer: Any) -> bool:
        """Gives a sequence what it needs to choose and to end; whether it has not ended already."""
        request = sequence.request
        try:
            sequence.chooser = Chooser(request.sampling, request.prompt, self.seats.device, request.ids)
            sequence.stopper = Stopper(request.sampling, ends, tokenizer)
            if callable(request.source):
                request.source = request.source()
            reason = ended(sequence) if sequence.sampled else None  # all but the end of it had been told
        except Exception as e:  # what makes a prompt's beginning may fail
            request.end(State.FAILED, "error", e)
            return False
        if reason:
            self.finish(sequence, State.DONE, reason, None)
        return not reason

    def run(self, work: Work) -> None:
        """Does what was planned; a request in which something goes wrong ends alone."""
        with torch.cuda.device_of(self.seats.numbers.last):  # where graphs and events are, and may not be otherwise
            self._run(work)

    def _run(self, work: Work) -> None:
        if work.decode:
            self._decode(work.decode)
        short = [x for x in work.chunks if self._is_short(*x)]
        together = short if len(short) > 1 or self.seats.captures else []
        if together:
            self._read_together(together)
        for sequence, count in work.chunks:
            if (sequence, count) not in together:
                self._read_alone(sequence, count)
            while self.ranks.count == 1 and self.pending and self.pending[0].come:
                self._hear(self.pending.popleft())  # others read on for long; ranks hear of all at the same time
        while len(self.pending) > (self.behind if work.decode else 0):
            self._hear(self.pending.popleft())
        while self._parking:  # nobody's first token waits for that
            if not (sequence := self._parking.popleft()).request.state.ended:
                self.memory.park(sequence)

    def settle(self) -> None:
        """Waits for all that was launched."""
        while self.pending:
            self._hear(self.pending.popleft())

    def close(self) -> None:
        """Forgets what was launched, and lets seats and pages go: there is no further step."""
        self.pending.clear()
        self._parking.clear()
        self.seats.close()
        self.memory.close()

    def _decode(self, sequences: list[Served]) -> None:
        try:
            said = self.seats.decode(sequences)
            self.decoded += len(sequences)
            kept, chosen = self._choose(sequences, said)
        except Exception as e:  # of whom it came is not known
            self._fail_all(sequences, e)
            return
        if kept and chosen is not said.likeliest:  # which the seats have taken already
            self.seats.choose(kept, chosen)

    def _raise_among_others(self, error: Exception) -> None:
        """Ends the engine where other ranks know nothing of what has gone wrong in the middle of a step."""
        if self.ranks.count > 1:
            raise error

    def _is_short(self, sequence: Served, count: int) -> bool:
        """Whether it is the end of a prompt, no longer than a page, with nothing of segments to come before it."""
        return count == sequence.unread and count <= self.memory.page_size and sequence.done >= sequence.request.lead

    def _read_together(self, parts: list[tuple[Served, int]]) -> None:
        """Reads the ends of several prompts; where that fails, one by one, so that only who is at fault ends."""
        try:
            for sequences, said in self.seats.read(parts):
                self.read += sum(count for sequence, count in parts if sequence in sequences)
                self._parking += [x for x in sequences if not x.sampled]
                self._begin_answers(sequences, said)
        except Exception as e:
            self._raise_among_others(e)
            left = [(sequence, count) for sequence, count in parts if sequence.unread]
            for sequence, count in left:
                self._read_alone(sequence, count)
            if not any(sequence.request.state is State.FAILED for sequence, _ in left):
                warn(f"ends of {len(left)} prompts were read one by one, since together: {e}", stacklevel=2)

    def _fail_all(self, sequences: list[Served], error: Exception) -> None:
        self._raise_among_others(error)
        for sequence in sequences:
            self.finish(sequence, State.FAILED, "error", error)

    def _begin_answers(self, sequences: list[Served], said: Said) -> None:
        try:
            kept, chosen = self._choose(sequences, said)
        except Exception as e:  # of whom it came is not known
            self._fail_all(sequences, e)
            return
        for sequence in kept:
            sequence.request.state = State.DECODING
        if kept:
            self.seats.choose(kept, chosen)

    def _read_alone(self, sequence: Served, count: int) -> None:
        if sequence.request.state.ended or sequence.seat is None:
            return
        try:
            self._read(sequence, count)
        except Exception as e:
            self._raise_among_others(e)
            self.finish(sequence, State.FAILED, "error", e)

    def _assemble(self, sequence: Served, count: int) -> int:
        """Goes on with a request's segments; how many of the tokens may be read behind them in the same step."""
        assert self.documents is not None
        assembling = sequence.assembling
        if assembling is None or assembling.cache is not sequence.held:
            assembling = sequence.assembling = self.documents.begin(sequence, sequence.reserved)
        first, recomputed = sequence.done, assembling.step()
        sequence.done = assembling.done
        taken = sequence.done - first - recomputed
        self.read, self.reused = self.read + recomputed, self.reused + taken
        if not sequence.sampled:
            sequence.request.cached += taken
        if sequence.done < sequence.request.lead:
            return 0
        sequence.assembling = None
        self.memory.park(sequence)
        return min(max(count - recomputed, 1), sequence.unread)

    def _read(self, sequence: Served, count: int) -> None:
        if sequence.done < sequence.request.lead:
            count = self._assemble(sequence, count)
            if not count:
                return
        first, last = sequence.done, sequence.done + count
        device = self.seats.device
        ids = torch.tensor([sequence.tokens[first:last]], device=device)
        positions = torch.arange(first, last, device=device)[None]
        logits = self.memory.model(
            input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{self.memory.name: sequence.held},
        ).logits[:, -1].to(device)  # fmt: skip
        sequence.done = last
        self.read += count
        ends = sequence.unread == 0
        if not sequence.sampled and (ends or last // self.park_every > first // self.park_every):
            self._parking.append(sequence)
        if ends:
            kept, chosen = self._choose([sequence], Said(logits))
            if kept:
                sequence.request.state = State.DECODING
                self.seats.place(sequence, chosen)

    def _choose(self, sequences: list[Served], said: Said) -> tuple[list[Served], Int[Tensor, " kept"]]:
        """Chooses, and lets the host hear of it; gives those who could, and their tokens."""
        refused, chosen = self._tried(sequences, said) if self.ranks.leads else ({}, None)
        refusals = self.ranks.told({i: str(error) for i, error in refused.items()})
        for i, text in refusals.items():
            self.finish(sequences[i], State.FAILED, "error", refused.get(i, RuntimeError(text)))
        kept = [i for i in range(len(sequences)) if i not in refusals]
        if not kept:
            return [], torch.zeros(0, dtype=torch.long)
        sequences, chosen = [sequences[i] for i in kept], self.ranks.tokens(chosen, len(kept), said.device)
        likely = {}
        for i, (row, sequence) in enumerate(zip(kept, sequences, strict=True)):
            sequence.sampled += 1
            most = sequence.request.sampling.logprobs
            if most is not None and self.ranks.leads:
                likely[i] = log_probabilities(said.logits[row : row + 1], chosen[i : i + 1], most)
        self.pending.append(on_its_way(sequences, chosen, likely))
        return sequences, chosen

    def _tried(self, sequences: list[Served], said: Said) -> tuple[dict[int, Exception], Int[Tensor, " kept"] | None]:
        """Errors of those who cannot choose, by index, and the tokens of the others."""
        choosers = [x.chooser for x in sequences]
        if all(x.sampling.plain for x in choosers):
            return {}, said.likeliest
        try:
            return {}, choose(said.logits, choosers)
        except Refusals as refused:
            others = [x.chooser for i, x in enumerate(sequences) if i not in refused.errors]
            return refused.errors, settle(refused.scores, others) if others else None

    def _hear(self, chosen: Chosen) -> None:
        if chosen.ready is not None:
            chosen.ready.synchronize()
        heard = [
            (sequence, told(token, chosen.likely.get(i)))
            for i, (sequence, token) in enumerate(zip(chosen.sequences, chosen.tokens.tolist(), strict=True))
            if not sequence.request.state.ended
        ]
        for sequence, token in heard:
            sequence.tokens.append(token.id)
        ends = [self._take(*one) for one in heard] if self.ranks.leads else []
        for i, (reason, text) in enumerate(self.ranks.told([(why, error and str(error)) for why, error in ends])):
            if reason == "error":
                error = ends[i][1] if ends else RuntimeError(text)
                self.finish(heard[i][0], State.FAILED, reason, error)
            elif reason:
                try:
                    self._end(heard[i][0], reason)
                except Exception as e:
                    self._raise_among_others(e)
                    self.finish(heard[i][0], State.FAILED, "error", e)

    def _take(self, sequence: Served, token: Token) -> tuple[str | None, BaseException | None]:
        """Hands a token on; why the answer ends with it, if it does, and what a callback raised."""
        request = sequence.request
        before = request.last_token
        try:
            request.emit(token)
            since = request.arrived if before is None else before
            self.observe("first" if before is None else "next", (request.last_token or since) - since)
            return ended(sequence), None
        except (Exception, SystemExit) as e:  # which would end the engine's thread, and not the process
            return "error", e

    def _end(self, sequence: Served, reason: str) -> None:
        if sequence.seat is not None and sequence.done <= len(sequence.tokens) and not sequence.swapped:
            self.memory.park(sequence)  # a conversation goes on from here
        self.finish(sequence, State.DONE, reason, None)


def ended(sequence: Served) -> str | None:
    """Why an answer ends with its last token; `None` if it goes on."""
    request = sequence.request
    if sequence.stopper.ends([x.id for x in request.tokens[-sequence.stopper.tail :]]):
        return "stop"
    return "length" if len(request.tokens) >= request.sampling.max_new_tokens else None
