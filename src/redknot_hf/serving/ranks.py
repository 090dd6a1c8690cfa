"""Ranks: processes that share a tensor-parallel model and serve as one engine, of which the first decides.

Every rank runs the same engine over the pages of its own heads. What only the first knows (who asks, what was chosen,
who has ended) it tells; what depends on pages, such as whether a sequence fits, holds if it holds on every rank. So
all take the same steps. Messages go over gloo, beside what the model itself exchanges.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from warnings import warn

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, distributed

Value = TypeVar("Value")

_SHORT = 1024  # bytes of a message that goes in one piece, its length included


class Ranks:
    """One of the ranks; alone, where a model is whole.

    Attributes:
        number, count: Which of how many.

    Args:
        model: Of transformers. Ranks are made together, in all processes.
        seconds: That ranks wait for each other at most, before they give up.

    Raises:
        ValueError: The model is not shared by all processes of the default group.
    """

    def __init__(self, model: Any = None, seconds: float | int = 600) -> None:
        self.number, self.count, self.seconds = 0, getattr(model, "tp_size", None) or 1, seconds
        self._group: Any = None
        if not seconds > 0:
            raise ValueError(f"rank_timeout={seconds}: give the seconds that ranks wait for each other, above 0")
        if self.count == 1:
            return
        if (world := distributed.get_world_size()) != self.count:
            raise ValueError(
                f"the model is shared by {self.count} processes of {world}: run an engine for each model, with a "
                f"torchrun of {self.count} processes"
            )
        self.number = distributed.get_rank()
        self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    @property
    def leads(self) -> bool:
        """Whether this is the first, or the only one."""
        return self.number == 0

    def check_leads(self) -> None:
        """Checks that this rank takes requests.

        Raises:
            RuntimeError: It follows another.
        """
        if not self.leads:
            raise RuntimeError(
                f"rank {self.number} of {self.count} follows rank 0, which takes the requests: call engine.follow()"
            )

    def check_alone(self, **given: Any) -> None:
        """Checks that nothing is given that holds the heads of one process, where several share the model.

        Raises:
            ValueError: Something is; names it.
        """
        found = next((name for name, value in given.items() if value is not None), None)
        if self.count > 1 and found:
            raise ValueError(
                f"{found}= holds what one process has read, of its own heads, and {self.count} share the model: leave "
                "it out, and put documents into prompts, whose beginnings are kept; or run a whole model a process"
            )

    def check_follows(self) -> None:
        """Checks that there is a rank to follow.

        Raises:
            RuntimeError: This one leads.
        """
        if self.leads:
            raise RuntimeError(f"rank 0 of {self.count} leads: submit requests here, and follow() on the other ranks")

    @property
    def captures(self) -> bool:
        """Whether what ranks exchange within the model can be part of a CUDA graph."""
        return self.count == 1 or "nccl" in distributed.get_backend()

    def told(self, value: Value) -> Value:
        """What the first rank says, on every rank.

        Args:
            value: Of no meaning on the others. It is pickled, and read by processes of this run alone.

        Raises:
            RuntimeError: A rank has gone, or takes too long.
        """
        if self._group is None:
            return value
        data = pickle.dumps(value) if self.leads else b""
        room = torch.zeros(_SHORT, dtype=torch.uint8)
        if self.leads:
            _write(room, len(data).to_bytes(8, "little") + data[: _SHORT - 8])
        distributed.broadcast(room, 0, group=self._group)
        held = room.numpy().tobytes()
        length, data = int.from_bytes(held[:8], "little"), data if self.leads else held[8:]
        if length > _SHORT - 8:
            whole = torch.zeros(length, dtype=torch.uint8)
            if self.leads:
                _write(whole, data)
            distributed.broadcast(whole, 0, group=self._group)
            data = whole.numpy().tobytes()
        return value if self.leads else pickle.loads(data[:length])

    def all(self, mine: bool) -> bool:
        """Whether it is so on every rank."""
        return bool(self.least(int(mine)))

    def least(self, mine: int) -> int:
        """The least of all ranks' numbers."""
        if self._group is None:
            return mine
        number = torch.tensor([mine])
        distributed.all_reduce(number, distributed.ReduceOp.MIN, group=self._group)
        return int(number)

    def most(self, mine: int) -> int:
        """The greatest of all ranks' numbers."""
        return -self.least(-mine)

    def tokens(self, mine: Int[Tensor, " tokens"] | None, count: int, device: torch.device) -> Int[Tensor, " tokens"]:
        """The tokens that the first rank has chosen, on every rank's device; the host does not wait for them."""
        if self._group is None or mine is None:
            mine = torch.empty(count, dtype=torch.long, device=device) if mine is None else mine
        if self._group is not None:
            distributed.broadcast(mine, 0)
        return mine

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ends all ranks with what ends one: what is not done by all alike cannot be gone on with.

        Raises:
            RuntimeError: What was done in the block failed, here or on another rank.
        """
        try:
            yield
        except Exception as e:
            if self.count == 1:
                raise
            self.end(None)
            raise RuntimeError(
                f"rank {self.number} of {self.count} is no longer in step with the others, so the run ends: this one "
                f"failed, or another has gone or took more than {self.seconds} s. Start the run again. Here it was: "
                f"{type(e).__name__}: {e}"
            ) from e

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Leaves the others if the block fails, so that none waits for this one, and no group of theirs stays."""
        try:
            yield
        except BaseException:
            self.end(None)
            raise

    def end(self, last: Any) -> None:
        """Leaves the others, of whom none waits for this one any more; warns where one has gone already.

        Args:
            last: What the first rank tells before, on which they leave too; `None` where they may not listen.
        """
        group = self._group
        try:
            if last is not None and self.leads:
                self.told(last)
        except RuntimeError as e:
            warn(f"another rank of {self.count} had gone before the engine was shut down: {e}", stacklevel=2)
        finally:
            self._group = None
            if group is not None:
                distributed.destroy_process_group(group)


def _write(room: UInt8[Tensor, " bytes"], data: bytes) -> None:
    room[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
